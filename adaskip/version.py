"""The version of adaskip."""

__version__ = "0.2.0"
