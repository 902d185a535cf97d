"""The adversarial loss of a list of logits, as one op: a weighted sum of reduced elementwise functions."""
