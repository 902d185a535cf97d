"""Validation: what mmfast computes is held against float64 and against PyTorch, and the checks against planted bugs."""
