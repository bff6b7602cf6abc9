"""Doors into other libraries. Each module imports its library only when it is itself imported."""
