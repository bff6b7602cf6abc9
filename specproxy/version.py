"""The version of the package, written once. Knows nothing else, so that `setup.py` can read it without importing torch."""

__version__ = "0.1.0"
