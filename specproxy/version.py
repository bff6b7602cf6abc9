"""The version of the package, written once, where `setup.py` can read it without importing torch."""

__version__ = "0.1.0"
