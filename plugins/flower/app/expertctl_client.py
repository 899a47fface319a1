"""Client app: imports the code of the owner's installation."""

from expertctl.plugins.flower.owner.taking_in import app

__all__ = ["app"]
