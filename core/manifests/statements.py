"""Data statements: how much text an artefact was trained on, and at which privacy cost. They never hold text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from .records import record


@record
class DomainStatement:
    """The training part of one domain."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """Length in UTF-8."""
    digest: str | None = None
    """Digest of the text; None for private text, where it could confirm a guess."""
    licence: str | None = None
    rounded: bool = False
    """Whether the counts are rounded to two digits, as those of private text are."""


@record
class PrivacyStatement:
    """The differential-privacy guarantee of a run, and the mechanism that gives it."""

    protects: str
    """Unit of privacy, such as `one block of 256 tokens, added or removed`."""
    epsilon: float | None
    """None where the noise was drawn from the run's random seed and could be subtracted."""
    delta: float
    accountant: str
    noise: Literal["secret", "seeded"]
    noise_multiplier: float
    clip: float
    """Largest norm of one block's gradient."""
    sampling_rate: float
    """Probability with which a block is in a batch."""
    steps: int
    history: tuple[tuple[float, float, int], ...]
    """Every release as (noise multiplier, sampling rate, steps)."""
    opacus: str
    """Version of the accountant's library."""
    epsilon_if_noise_were_secret: float | None = None


@record
class DataStatement:
    """The text that one training run read."""

    domains: Mapping[str, DomainStatement] = field(default_factory=dict)
    trained_tokens: int | None = None
    privacy: PrivacyStatement | None = None
    """None for a run without differential privacy."""
