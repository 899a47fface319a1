"""Mixtures of experts: how routers begin, and where a model family keeps its tensors."""

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
    """Everything that the start of a mixture's router may be made from. L = layers, E = experts, d = width."""

    seed: Path
    """Folder of the model whose hidden states the router will see."""
    experts: Mapping[str, Path | None]
    """In the order of the router's rows; None for one that is in no folder of its own."""
    num_layers: int
    width: int
    options: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the merge says of single experts, such as `{code: {positive_prompts: [...]}}`."""
    validation: Callable[[], Sequence[ValidationText]] = tuple
    domains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The domains that each expert was trained on, as far as is known."""
    reporter: Reporter = SILENT
    """Receives messages for the user."""


@dataclass(frozen=True)
class RouterRows:
    """The rows and biases that a router begins with, float32 numpy arrays."""

    rows: NDArray[Any]
    """(L, E, d)."""
    biases: NDArray[Any] | None = None
    """(L, E), or None."""
    unit: NDArray[Any] | None = None
    """Vectors (L, E, d) that give about 1 for any hidden state, by which a bias can be folded into rows; or None."""


@dataclass(frozen=True)
class RouterStart:
    """A way to begin the router of a mixture of given experts."""

    name: str
    summary: str
    start: Callable[[RouterInputs], RouterRows]
    """`start(inputs)`; raises `UserError` for what it lacks."""
    uses_model: bool = False
    """Whether it runs the seed, which plans leave for later."""
    uses_text: bool = False
    """Whether it reads validation text, so that the merge cannot be repeated from its manifest alone."""


@dataclass(frozen=True)
class MixtureShape:
    """What a mixture of experts is like, whatever family it is of."""

    num_experts: int
    top_k: int
    """Experts that each token passes through."""
    normalized: bool = True
    """Whether the gates of those experts sum to one."""
    router_bias: bool = False
    """Whether the router adds a bias to its logits."""


@dataclass(frozen=True)
class MixtureTarget:
    """A model class that dense models of a family can become as a mixture of experts, and how tensors are called there.

    Names of tensors are those within a layer: `mlp.up_proj.weight`.
    """

    name: str
    model_class: str
    """The class that `config.json` names."""
    config: Callable[[Mapping[str, Any], MixtureShape], dict[str, Any]]
    """`config(dense, shape)` returns the mixture's `config.json`, all it shares with the dense one taken over."""
    expert: Callable[[str, int], str]
    """`expert(name, number)` returns what the feed-forward's tensor `name` is called in expert `number`."""
    router: str
    """Name of the (experts, width) matrix of router rows."""
    refusal: Callable[[Mapping[str, Any], MixtureShape], str | None] = lambda dense, shape: None
    """`refusal(dense, shape)` returns the rule that a model breaks, in words, or None when it fits."""
    router_bias: str | None = None
    """Name of the router's bias (experts,), where the class has one."""
    zeros: Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]] = lambda config: {}
    """`zeros(config)` returns further tensors of every layer that are 0, by name, with their shapes."""
    prefix: str = ""
    """What stands before the dense model's names."""


@dataclass(frozen=True)
class Architecture:
    """Where a model family keeps its parts. Patterns are shell-style, over tensor names."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` values of `config.json` that belong to the family."""
    feed_forward: tuple[str, ...]
    attention: tuple[str, ...]
    norms: tuple[str, ...]
    embeddings: tuple[str, ...]
    mixtures: tuple[MixtureTarget, ...] = ()
    """What its feed-forwards can become the experts of, the first choice first."""
