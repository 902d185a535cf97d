"""Recurrent layers and cells against PyTorch's, each pass."""

OP = "rnn"


def test_rnn(compare, bout_of):
    compare(bout_of)
