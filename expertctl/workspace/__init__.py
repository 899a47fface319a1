"""The Python interface to a workspace: data, experts, generalists and baselines, one module each."""

from .workspace import Workspace

__all__ = ["Workspace"]
