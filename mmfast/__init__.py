"""mmfast: fast training of multimodal image generators, behind PyTorch's own modules."""

from . import functional, nn
from .accelerate import accelerate, explain, restore
from .dispatch import use_backend

__version__ = "0.1.0"

__all__ = ["__version__", "accelerate", "explain", "functional", "nn", "restore", "use_backend"]
