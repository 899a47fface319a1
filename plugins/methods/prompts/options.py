"""Options of the trainers of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....core.hooks.option_checks import check_at_least

Initialisation = Literal["vocabulary", "random"]
"""`vocabulary`: embeddings of tokens drawn at random; `random`: numbers of a standard normal distribution."""
Place = Literal["before", "after"]


@dataclass(frozen=True)
class PromptOptions:
    """Options of every prompt."""

    tokens: int = 20
    """Rows of the prompt, each of which takes a position of the model's context."""
    initialisation: Initialisation = "vocabulary"
    """First rows: embeddings of tokens drawn at random (`vocabulary`), or numbers of a standard normal distribution (`random`)."""

    def __post_init__(self) -> None:
        check_at_least("tokens", self.tokens, 1)


@dataclass(frozen=True)
class PromptTuning(PromptOptions):
    """Options of the trainer `prompt`."""

    start: str | None = None
    """Expert whose prompt, of the same number of rows, training starts from. Not set: a new one."""


@dataclass(frozen=True)
class ResidualTuning(PromptOptions):
    """Options of the trainer `residual_prompt`."""

    bottleneck: int = 800
    """Width of the MLP's hidden layer."""
    layers: int = 1
    """Times that the MLP's two linear layers follow each other, each with weights of its own."""
    layer_norm: bool = True
    """Normalise the MLP's output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("bottleneck", self.bottleneck, 1)
        check_at_least("layers", self.layers, 1)


@dataclass(frozen=True)
class ProgressiveTuning(PromptOptions):
    """Options of the trainer `progressive_prompts`."""

    earlier: str | tuple[str, ...] = ()
    """Experts whose prompts stay as they are, the first one trained first: names, as a list or separated by commas."""
    place: Place = "before"
    """Place of the new prompt: `before` the earlier ones, as in the paper, or `after` them, between them and the text."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the earlier experts."""
        if isinstance(self.earlier, str):
            return tuple(name.strip() for name in self.earlier.split(",") if name.strip())
        return self.earlier

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(f"earlier names '{name}' twice")
