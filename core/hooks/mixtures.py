"""Mixtures of experts: router initialisation, and tensor names of model families."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting import SILENT, Reporter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .text import ValidationText


@dataclass(frozen=True)
class RouterInputs:
    """Inputs of a router initialisation. L = layers, E = experts, d = width."""

    seed: Path
    """Folder of the model whose hidden states the router receives."""
    experts: Mapping[str, Path | None]
    """Expert folders in the order of the router rows; None if an expert has no folder."""
    num_layers: int
    width: int
    options: Mapping[str, Any] = field(default_factory=dict)
    expert_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options set for single experts, such as `{code: {positive_prompts: [...]}}`."""
    validation: Callable[[], Sequence[ValidationText]] = tuple
    domains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Known training domains of each expert."""
    reporter: Reporter = SILENT
    """Receives messages for the user."""


@dataclass(frozen=True)
class RouterRows:
    """Initial rows and biases of a router, as float32 numpy arrays."""

    rows: NDArray[Any]
    """(L, E, d)."""
    biases: NDArray[Any] | None = None
    """(L, E), or None."""
    unit: NDArray[Any] | None = None
    """Vectors (L, E, d) that give about 1 for any hidden state, by which a bias can be folded into rows; or None."""


@dataclass(frozen=True)
class RouterStart:
    """A router initialisation."""

    name: str
    summary: str
    start: Callable[[RouterInputs], RouterRows]
    """`start(inputs)`; raises `UserError` for missing inputs."""
    uses_model: bool = False
    """Whether it runs the seed; `merge --plan` skips it."""
    uses_text: bool = False
    """Whether it reads validation text, so that the merge cannot be repeated from its manifest alone."""


@dataclass(frozen=True)
class MixtureShape:
    """Shape of a mixture of experts, independent of the model family."""

    num_experts: int
    top_k: int
    """Experts that each token passes through."""
    normalized: bool = True
    """Whether the gates of those experts sum to one."""
    router_bias: bool = False
    """Whether the router adds a bias to its logits."""


@dataclass(frozen=True)
class MixtureTarget:
    """A mixture class for dense models of a family; tensor names are those within a layer: `mlp.up_proj.weight`."""

    name: str
    model_class: str
    """The class that `config.json` names."""
    config: Callable[[Mapping[str, Any], MixtureShape], dict[str, Any]]
    """`config(dense, shape)` returns the mixture's `config.json`, based on the dense model's."""
    expert: Callable[[str, int], str]
    """`expert(name, number)` returns the name of FFN tensor `name` in expert `number`."""
    router: str
    """Name of the (experts, width) matrix of router rows."""
    refusal: Callable[[Mapping[str, Any], MixtureShape], str | None] = lambda dense, shape: None
    """`refusal(dense, shape)` returns the reason why the model cannot be converted, or None."""
    router_bias: str | None = None
    """Name of the router's bias (experts,), if the class has one."""
    zeros: Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]] = lambda config: {}
    """`zeros(config)` returns the names and shapes of further tensors of every layer, which are 0."""
    prefix: str = ""
    """Prefix of the dense model's tensor names."""


@dataclass(frozen=True)
class Architecture:
    """Tensor names of a model family, as shell-style patterns."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` values of `config.json` that belong to the family."""
    feed_forward: tuple[str, ...]
    attention: tuple[str, ...]
    norms: tuple[str, ...]
    embeddings: tuple[str, ...]
    mixtures: tuple[MixtureTarget, ...] = ()
    """Mixture classes of the family, preferred first."""
