"""Steps of training: objectives, which say what a batch's loss is, and optimisers.

Shapes: B = blocks in a forward pass, T = predicted tokens of a block, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .option_checks import check_options_class

if TYPE_CHECKING:
    from numpy.random import Generator
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from ..config.settings import TrainingConfig
    from ..text.token_store import Row

Contents = Literal["text", "conversations", "pairs"]
"""What documents are; `CorpusFormat.holds`."""
IGNORED = -100
"""Target of a token that does not count, as torch's losses expect it."""


@dataclass(frozen=True)
class Batch:
    """The blocks of a forward pass."""

    tokens: Tensor
    """Token ids, (B, T + 1); inputs are all but the last of a row, targets all but the first."""
    counted: Tensor | None = None
    """Whether each target counts, (B, T); None: all do."""
    positions: Tensor | None = None
    """Position of each input in its own document, (B, T), where documents of a block are kept apart."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward pass."""
        positions = {} if self.positions is None else {"position_ids": self.positions}
        return {"input_ids": self.tokens[:, :-1], "use_cache": False, **positions}

    @property
    def targets(self) -> Tensor:
        """Token ids to predict, (B, T); `IGNORED` where a token does not count."""
        targets = self.tokens[:, 1:]
        return targets if self.counted is None else targets.masked_fill(~self.counted, IGNORED)

    @property
    def num_counted(self) -> int:
        """Number of targets that count."""
        return self.tokens[:, 1:].numel() if self.counted is None else int(self.counted.sum())


Loss = Callable[[Callable[..., Any], Batch], "Tensor"]
"""`loss(forward, batch)` returns the mean over the terms of a batch, shape (), 0 if it has none; `forward(**batch.inputs)`
runs the model."""


class TrainingObjective:
    """What a run minimises; subclass it for own blocks and losses. Its defaults are next-token prediction."""

    notes: tuple[str, ...] = ()
    """Lines shown to the user when the run begins."""

    def row(self, row: Row, random: Generator) -> Row:
        """Return the block to train on in place of one of the text, of the same length; `random` depends on its place."""
        return row

    def loss(self, forward: Callable[..., Any], batch: Batch, next_token: Loss) -> Tensor:
        """Return the mean over the terms of a batch, shape (), 0 if it has none.

        `next_token` is the mean cross-entropy of the targets that count, in nats per token.
        """
        return next_token(forward, batch)

    def num_terms(self, batch: Batch) -> int:
        """Return the number of terms that the loss of a batch is a mean of; a step's loss is the mean over all of its terms."""
        return batch.num_counted


@dataclass(frozen=True)
class ObjectiveContext:
    """Everything that an objective may use to prepare a run."""

    model: PreTrainedModel
    """The model that training starts from; its weights may not be read yet, if several processes share them out."""
    open_start: Callable[[], PreTrainedModel]
    """Returns that model once more, with its weights, in float32 on the CPU."""
    tokenizer_folder: Path
    options: Any
    open_model: Callable[[str], PreTrainedModel]
    """Returns one of the models that `Objective.models` named, in float32 on the CPU."""
    cache: Path
    """Folder for files of this process that are worth keeping until the run ends; it may not exist yet."""


@dataclass(frozen=True)
class Objective:
    """A loss that runs can minimise (`training.objective`)."""

    name: str
    summary: str
    prepare: Callable[[ObjectiveContext], TrainingObjective]
    """`prepare(context)`; raises `UserError` for a model or options that it cannot train with."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""
    reads: tuple[Contents, ...] = ("text", "conversations")
    """Documents that it can train on."""
    require: Callable[[Path, Any], None] | None = None
    """`require(folder, options)` raises `UserError` for a tokenizer in `folder` that it cannot train with, before a run is set
    up."""
    models: Callable[[Any], tuple[str, ...]] | None = None
    """`models(options)` names the other models of the project that it opens, which become parents of what is trained; raises
    `UserError` for options without them. None: it opens none."""

    def __post_init__(self) -> None:
        check_options_class(self.options, f"objective '{self.name}'")


@dataclass(frozen=True)
class Optimiser:
    """An optimiser that runs can use (`training.optimiser`)."""

    name: str
    summary: str
    make: Callable[[Mapping[str, nn.Parameter], TrainingConfig, Any], Optimizer]
    """`make(parameters, config, options)`, with parameters by their names in the model; the loop sets the learning rate of
    every group before each step. Tensors and numbers of its state are stored in checkpoints."""
    state_bytes: Callable[[Mapping[str, nn.Parameter]], int]
    """`state_bytes(parameters)` returns the size of its state after the first step."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""
    is_elementwise: bool = True
    """Whether a step of a parameter needs only the same part of its gradient, so that processes can share it out (FSDP)."""
    require: Callable[[], None] | None = None
    """`require()` raises `UserError` where it cannot be used, before a run begins."""

    def __post_init__(self) -> None:
        check_options_class(self.options, f"optimiser '{self.name}'")
