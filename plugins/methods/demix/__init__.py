"""DEMix layers."""

from .plugin import trainers

__all__ = ["trainers"]
