"""FlexOlmo."""

from .plugin import merge_methods, trainers

__all__ = ["merge_methods", "trainers"]
