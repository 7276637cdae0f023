"""adaskip: teach a frozen transformer which of its layers an input does not need, and leave that work out."""

__version__ = "0.1.0"
