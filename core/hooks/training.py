"""Training: trainers, the parameters that they train, and launchers of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .option_checks import check_options_class

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class PrivateReleases(Protocol):
    """The only way to what a trainer may learn of private text before training; everything is paid for out of epsilon."""

    @property
    def releases_embedding(self) -> bool:
        """Whether the owner wants an embedding released (`dp.embedding_noise` is set)."""
        ...

    def embedding_mean(self, rows: Iterable[Tensor], clip: float) -> Tensor:
        """Return the mean of vectors (n,), one for each block of the text, each cut to norm `clip`, with noise."""
        ...


@dataclass(frozen=True)
class TrainablePart:
    """What one training run moves: the module that computes, and the parameters that change."""

    module: nn.Module
    """Called as `module(input_ids=..., use_cache=False)`, gives an object with `.logits` of shape (B, T, V)."""
    parameters: Mapping[str, nn.Parameter]
    """Everything that is trained, by its name in the checkpoint."""
    auxiliary_loss: Callable[[], Tensor] | None = None
    """Called after each forward pass: what is added to its cross-entropy, shape ()."""
    auxiliary_per_example: bool = False
    """Whether the auxiliary loss is a mean over the batch of what depends on one example each, as training with
    differential privacy needs."""
    tensors: Callable[[], Mapping[str, Tensor]] | None = None
    """Returns the trained tensors by the names that the starting model has for them; None: they have these names."""
    beside: Callable[[], Mapping[str, Mapping[str, Tensor]]] | None = None
    """Returns further tensors of the artefact, by file and name, that the starting model has none of."""
    tell_domains: Callable[[Sequence[int]], None] | None = None
    """Told before each forward pass which domain of the run each row of the batch is of."""
    tell_step: Callable[[int], None] | None = None
    """Told before each optimiser step how many were done."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest of a generalist says besides: `method`, `kind`, `weights` ... What stands under `tuning` is
    laid over what it says of this training: `made`, names of experts that came to be in it; `began_as`, what they are copies of
    where they alone trained."""
    measures: Callable[[], Mapping[str, float]] | None = None
    """Returns what is worth logging of the last forward pass, beside its loss; called when a step is logged."""
    shares: Mapping[str, float] | None = None
    """How much of the blocks each domain of the run gives; None: all the same."""
    notes: Sequence[str] = ()
    """What whoever trains should know of it, a line each: shown when the run begins."""
    finish: Callable[[Path], None] | None = None
    """Writes the model's files into the folder of a generalist; None: it is saved as transformers saves it."""


@dataclass(frozen=True)
class Trainer:
    """Which part of a model trains, and how."""

    name: str
    summary: str
    prepare: Callable[..., TrainablePart]
    """`prepare(model, options)` freezes what stays and returns what moves; with `uses_text` it is called as
    `prepare(model, options, text)` with a `TrainingText`."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""
    uses_text: bool = False
    private_text: bool = False
    """With `uses_text`: whether it keeps to `TrainingText.private`; others are refused private runs."""
    makes: Literal["expert", "generalist"] = "expert"
    """What a run becomes: tensors that changed (`branch` and `train`), or a whole model (`tune`)."""
    restore: Callable[[PreTrainedModel, Path], PreTrainedModel] | None = None
    """`restore(model, folder)` makes the starting model into what was trained, from an expert's folder; None: the
    expert's tensors go over those of the same name."""
    require: Callable[[Path, Any, Sequence[str]], None] | None = None
    """`require(folder, options, domains)` raises `UserError` for a generalist, options or domains that it cannot train,
    before a run is set up and anything is replaced."""
    changes: Literal["all", "feed_forward"] = "all"
    """Which of the starting model's tensors can come out changed: an expert that someone else trained is held to it."""

    def __post_init__(self) -> None:
        check_options_class(self.options, f"trainer '{self.name}'")


@dataclass(frozen=True)
class LaunchResult:
    """How one run ended, as the launcher saw it."""

    run: Path
    error: str | None
    """One line, or None when the run finished."""
    interrupted: bool = False


class RunReporter(Protocol):
    """What a launcher tells about its runs while they go on."""

    def started(self, run: Path, total_steps: int) -> None: ...
    def progressed(self, run: Path, record: Mapping[str, Any]) -> None: ...
    def finished(self, result: LaunchResult) -> None: ...


@dataclass(frozen=True)
class Launcher:
    """Where training runs: a process here, a node of a cluster, a data owner."""

    name: str
    summary: str
    launch: Callable[[Sequence[Path], int, RunReporter], list[LaunchResult]]
    """`launch(runs, jobs, reporter)` trains every run folder, at most `jobs` at a time, and returns when all
    have ended. One run that dies must not touch the others."""
