"""The owner's part, by name: the code is that of the owner's installation."""

from expertctl.plugins.flower.owner.taking_in import app

__all__ = ["app"]
