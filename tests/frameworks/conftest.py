"""The framework that tests of environments install, as a fixture."""

from tiny_framework import tiny

__all__ = ["tiny"]
