"""`mmfast validate`: a certificate of what this installation computes, held against float64 and against PyTorch."""
