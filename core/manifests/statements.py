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
    """Size of the text in UTF-8."""
    digest: str | None = None
    """Digest of the text; None for private text, because a digest could confirm a guess of it."""
    licence: str | None = None
    """Licence of the text."""
    rounded: bool = False
    """Whether the counts are rounded to two significant digits, as for private text."""


@record
class PrivacyStatement:
    """The differential-privacy guarantee of a run, and the mechanism that gives it."""

    protects: str
    """Unit of privacy, such as `one block of 256 tokens, added or removed`."""
    epsilon: float | None
    """Privacy budget spent by the run; None for `seeded` noise, which gives no guarantee."""
    delta: float
    """Probability that the epsilon bound fails."""
    accountant: str
    """Opacus accountant that computed epsilon: `rdp` or `prv`."""
    noise: Literal["secret", "seeded"]
    """Source of the noise."""
    noise_multiplier: float
    """Standard deviation of the noise on the sum of gradients, divided by `clip`."""
    clip: float
    """Maximum norm of each block's gradient."""
    sampling_rate: float
    """Probability that a block is part of a step."""
    steps: int
    """Number of optimiser steps."""
    history: tuple[tuple[float, float, int], ...]
    """All releases: (noise multiplier, sampling rate, steps)."""
    opacus: str
    """Version of Opacus, the accountant's library."""
    epsilon_if_noise_were_secret: float | None = None
    """For `seeded` noise: the epsilon that secret noise of the same size would give."""


@record
class DataStatement:
    """The training text of one run."""

    domains: Mapping[str, DomainStatement] = field(default_factory=dict)
    """Domains of the run, by name."""
    trained_tokens: int | None = None
    """Number of tokens trained on, repetitions included."""
    privacy: PrivacyStatement | None = None
    """Privacy guarantee; None: trained without differential privacy."""
    annealing: Mapping[str, DomainStatement] = field(default_factory=dict)
    """Domains that the last part of the run was drawn from, by name; `config.training.annealing` has its share and weights."""
