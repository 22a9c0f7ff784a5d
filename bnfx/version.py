"""The version of bnfx."""

__version__ = "0.1.0"
