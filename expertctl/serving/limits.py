"""Limits of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may cost, and all of them together."""

    max_tokens: int = 4096
    """Longest continuation that a request may ask for, in tokens."""
    request_seconds: float = 300.0
    """Longest time from the arrival of a request to the end of its continuation."""
    body_bytes: int = 4 << 20
    """Largest body of a request."""
    body_seconds: float = 20.0
    """Longest time for sending it."""
    choices: int = 64
    """Most continuations of one request, over all its prompts."""
    alternatives: int = 20
    """Most alternatives per token with log-probabilities."""
    rows: int = 32
    """Most texts of a model that are generated at a time."""
    waiting: int = 256
    """Most texts of a model that wait for their turn."""
    variants: int = 4
    """Most sets of disabled experts of a model that are kept ready."""
    connections: int = 1000
    """Most open connections."""
    grace_seconds: float = 30.0
    """How long running requests may take once the server is to stop."""
