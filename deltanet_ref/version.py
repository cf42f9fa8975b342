"""The version, for pyproject.toml and for everything that prints it."""

__version__ = "0.1.0"
