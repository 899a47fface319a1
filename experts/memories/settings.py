"""How a memory is built."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.models.decoding.memories.manifest import Codes, IndexKind

DEFAULT_K = 64
FIT_TOKENS = 20_000


@dataclass(frozen=True)
class BuildSettings:
    """How a memory is built."""

    context: int | None = None
    """Least number of tokens before a key (default: half of a window)."""
    index: IndexKind | None = None
    """None: by the number of keys."""
    codes: Codes | None = None
    """None: those that suit the index."""
    fit: bool = True
    """Fit the interpolation on validation text of the domains."""
    k: int = DEFAULT_K
    """Neighbours for the fit, and the default of the decoder."""
    fit_tokens: int = FIT_TOKENS
    """Number of validation tokens for the fit, at most."""
