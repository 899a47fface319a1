"""The configuration of a generalist as its manifest holds it: how it was merged, changed and trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from .records import record
from .run import RunSpec

GeneralistKind = Literal["average", "ensemble", "moe", "stitched", "shared"]
"""`shared`: trained by its owners together, in rounds."""


@record
class RouterRecord:
    """How the router of a mixture began."""

    start: str
    """Name of the router start."""
    biases: str
    """`keep`, `fold` or `drop`; `none` where the start had no biases."""
    uses_text: bool
    """Whether it was fitted on validation text, so that the manifest alone cannot reproduce it."""


@record
class AveragedExpert:
    """An expert whose tensors outside of the FFNs are part of a mixture's average, even after it left the mixture."""

    name: str
    digest: str
    weight: float | None
    licence: str | None


@record
class MixtureRecord:
    """A mixture of experts: its layout, and the dense model that it was assembled from."""

    target: str
    """Name of the mixture class that it was written as."""
    top_k: int
    router: RouterRecord
    options: Mapping[str, Any]
    family: str
    dense: Mapping[str, Any]
    """`config.json` of the dense model."""
    feed_forward: tuple[str, ...]
    """Names of the FFN tensors within a layer of the dense model."""
    averaged: tuple[AveragedExpert, ...] = ()
    """Set once an expert has left a mixture whose shared tensors are an average."""


@record
class Tuning:
    """One training run of a generalist."""

    name: str
    trains: str
    options: Mapping[str, Any]
    domains: Mapping[str, str | None]
    """Digest of the training text of each domain."""
    tokens: int
    base_digest: str
    """Digest of the model that it started from."""
    experts: tuple[str, ...]
    """Experts that were in the model during the run, and whose traces joint training leaves in it."""
    trained_inside: tuple[str, ...] = ()
    """Experts that the run itself added to the model."""
    copied_from: Mapping[str, str] = field(default_factory=dict)
    """For an added expert that trained alone: the expert that it is a copy of."""
    left: bool = False
    """Whether everything that the run trained has left the model since."""


@record
class ExpertChange:
    """One expert that joined a generalist, left it, or was replaced."""

    change: Literal["joined", "left", "replaced"]
    expert: str
    date: str
    base_digest: str
    """Digest of the generalist before the change."""


@record
class SearchRecord:
    """The result of a search for merge weights."""

    weights: Mapping[str, Any]
    bits_per_byte: float
    """Mean over the domains, on the blocks that trials were scored on."""
    start_bits_per_byte: float
    trials: int


@record
class GeneralistConfig:
    """Everything that a generalist's manifest says about how it came about."""

    method: str
    """Merge method, or the trainer of a model that was never merged."""
    kind: GeneralistKind = "average"
    weights: Mapping[str, Any] = field(default_factory=dict)
    """Share of each expert; empty where it differs from text to text."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the method."""
    experts: tuple[str, ...] = ()
    """Experts that stand side by side in the model, in its own order; empty for an average."""
    fitted_on: tuple[str, ...] = ()
    """Domains whose validation text was used."""
    recipe: Mapping[str, Any] | None = None
    """The merge recipe, for methods that the engine runs; None once the model was trained further."""
    shard_bytes: int | None = None
    merge: Mapping[str, Any] | None = None
    """The `merges` section, for methods that build a model of their own kind."""
    mixture: MixtureRecord | None = None
    search: SearchRecord | None = None
    history: tuple[ExpertChange, ...] = ()
    tunings: tuple[Tuning, ...] = ()
    run: RunSpec | None = None
    """The last training run."""
    training: Mapping[str, Any] | None = None
    """Settings of the training in rounds, for a shared model."""
    rounds: tuple[Mapping[str, Any], ...] = ()
    """Report of each round, for a shared model."""
