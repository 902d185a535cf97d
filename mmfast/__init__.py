"""mmfast: fast training of multimodal image generators, behind PyTorch's own modules."""

__version__ = "0.1.0"
