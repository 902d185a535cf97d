"""Transposed convolutions with what follows them against PyTorch's, each pass."""

OP = "conv_transpose"


def test_conv_transpose(compare, bout_of):
    compare(bout_of)
