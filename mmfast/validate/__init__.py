"""`mmfast validate`: what this installation computes, held against float64 and PyTorch; the checks, against planted bugs."""
