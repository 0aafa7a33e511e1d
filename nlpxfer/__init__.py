"""Knowledge transfer between language models, measured."""

__version__ = "0.1.0"
