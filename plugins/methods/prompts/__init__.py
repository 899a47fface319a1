"""Prompts: the smallest experts."""

from .plugin import trainers

__all__ = ["trainers"]
