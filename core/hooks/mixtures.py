"""Mixtures of experts: router initialisation, and tensor names of model families."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting import SILENT, Reporter

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from .text import ValidationText


def _without_expert_models(expert: str) -> PreTrainedModel:
    raise ValueError(f"there is no model of '{expert}': the router start does not declare runs_experts")


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
    expert_model: Callable[[str], PreTrainedModel] = _without_expert_models
    """`expert_model(name)` returns the dense model that the mixture is if every token is routed to one expert. It is
    valid until the next call. Only for router starts that declare `runs_experts`."""
    has_bias: bool = False
    """Whether the router adds a bias to its logits."""
    statistics: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    """`RouterRows.statistics` of experts that an earlier mixture contained; empty for a new mixture."""
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
    statistics: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    """Tensors by expert and name that are stored with the mixture. When its experts change, the router start gets them
    back and needs text of the new experts only."""


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
    runs_experts: bool = False
    """Whether it runs the experts (`RouterInputs.expert_model`), whose vocabularies must then be the same."""


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
    shared_expert: bool = False
    """Whether all tokens pass through a further expert, with a gate of its own."""


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
    """`zeros(config)` returns the names and shapes of further tensors of every layer, which are 0; with a shared expert,
    those of `shared_expert` and `shared_gate` are not."""
    shared_expert: Callable[[str], str] | None = None
    """`shared_expert(name)` returns the name of FFN tensor `name` in the shared expert; None: the class has none."""
    shared_gate: str | None = None
    """Name of the (1, width) row of the shared expert's gate."""
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
