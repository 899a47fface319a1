"""The coordinator's part, by name: the code is that of the coordinator's installation."""

from expertctl.plugins.flower.coordinator.handing_out import app

__all__ = ["app"]
