"""Server app: imports the code of the coordinator's installation."""

from expertctl.plugins.flower.coordinator.handing_out import app

__all__ = ["app"]
