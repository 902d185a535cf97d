"""`mmfast validate`: what is computed here against float64 and PyTorch, the checks against planted bugs."""
