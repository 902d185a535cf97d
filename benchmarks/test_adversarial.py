"""Adversarial losses against PyTorch's, each pass."""

OP = "adversarial"


def test_adversarial(compare, bout_of):
    compare(bout_of)
