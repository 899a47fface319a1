"""The `local` launcher: runs on this machine, several at a time, each in one process or in several that torchrun starts."""

from .plugin import launchers

__all__ = ["launchers"]
