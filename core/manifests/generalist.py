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
    """Initialisation of a mixture's router."""

    start: str
    """Name of the router start, such as `random` (option `router` of the merge)."""
    biases: str
    """Handling of the trained biases: `carry`, `fold` or `drop`; `none` if there were no biases."""
    uses_text: bool
    """Whether the router was fitted on validation text; the manifest alone is then not enough to reproduce the merge."""


@record
class AveragedExpert:
    """An expert whose attention, norms and embeddings are averaged into a mixture; removal does not change them."""

    name: str
    digest: str
    weight: float | None
    """Weight in the average; None: equal weights."""
    licence: str | None


@record
class MixtureRecord:
    """A mixture of experts: its layout, and the dense model that it was assembled from."""

    target: str
    """Model class of the mixture, such as `mixtral` or `container` (option `target` of the merge)."""
    top_k: int
    """Number of experts per token."""
    router: RouterRecord
    options: Mapping[str, Any]
    """Options of the merge method, with defaults filled in."""
    family: str
    """Architecture of the dense model."""
    dense: Mapping[str, Any]
    """`config.json` of the dense model."""
    feed_forward: tuple[str, ...]
    """Names of the FFN tensors of the dense model, relative to the layer."""
    averaged: tuple[AveragedExpert, ...] = ()
    """Experts in the average of the shared tensors, including removed ones; empty until an expert is removed."""
    shared_expert: str | None = None
    """The model whose feed-forward networks all tokens pass through, beside the experts; None: there is none."""


@record
class Tuning:
    """One training run of a generalist."""

    name: str
    """Name of the generalist that the run produced."""
    trains: str
    """Trainable parameters: a trainer, or a pattern of tensor names."""
    options: Mapping[str, Any]
    """Options of the trainer."""
    domains: Mapping[str, str | None]
    """Digest of the training text of each domain."""
    tokens: int
    """Number of training tokens."""
    base_digest: str
    """Digest of the model that the run started from."""
    experts: tuple[str, ...]
    """Experts in the model during the run. Joint training depends on their outputs, even if they are removed later."""
    trained_inside: tuple[str, ...] = ()
    """Experts that the run added to the model."""
    copied_from: Mapping[str, str] = field(default_factory=dict)
    """For each added expert that was trained without the others: the expert that it was initialised from."""
    left: bool = False
    """Whether all parameters that the run trained have since been removed from the model."""


@record
class ExpertChange:
    """The addition, removal or replacement of one expert of a generalist."""

    change: Literal["joined", "left", "replaced"]
    expert: str
    """Name of the expert."""
    date: str
    """Day of the change, as YYYY-MM-DD."""
    base_digest: str
    """Digest of the generalist before the change."""


@record
class SearchRecord:
    """The result of a search for merge weights."""

    weights: Mapping[str, Any]
    """Best weights: one number per expert, or a list over the layer groups."""
    bits_per_byte: float
    """Bits per byte of the best weights: mean over the domains, on the validation blocks of the search."""
    start_bits_per_byte: float
    """Bits per byte of the initial weights, on the same blocks."""
    trials: int
    """Number of merges that were scored."""


@record
class GeneralistConfig:
    """How a generalist was made: merge, changes of its experts, and further training."""

    method: str
    """Merge method; for a model trained from the seed without a merge, the trainer."""
    kind: GeneralistKind = "average"
    weights: Mapping[str, Any] = field(default_factory=dict)
    """Weight of each expert; empty if the weights depend on the text."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the method."""
    experts: tuple[str, ...] = ()
    """Experts that are separate in the model, in the model's order; empty for an average."""
    fitted_on: tuple[str, ...] = ()
    """Domains whose validation text priors, weights or routers were fitted on."""
    recipe: Mapping[str, Any] | None = None
    """The merge recipe, for methods that the merge engine runs; None after further training."""
    shard_bytes: int | None = None
    """Maximum size of a weights file."""
    merge: Mapping[str, Any] | None = None
    """Settings of the merge as in the `merges` section, for methods that build the model themselves."""
    mixture: MixtureRecord | None = None
    """Layout of a mixture of experts; None for other kinds."""
    search: SearchRecord | None = None
    """Result of the weight search; None: no search."""
    history: tuple[ExpertChange, ...] = ()
    """Changes of the experts, oldest first."""
    tunings: tuple[Tuning, ...] = ()
    """Training runs after the merge, oldest first."""
    run: RunSpec | None = None
    """Specification of the last training run."""
    training: Mapping[str, Any] | None = None
    """Shared models: settings of the rounds."""
    rounds: tuple[Mapping[str, Any], ...] = ()
    """Shared models: report of each round."""
