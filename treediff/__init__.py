"""Trees of clusters that one can generate from, on PyTorch."""

__version__ = "0.1.0.dev0"
