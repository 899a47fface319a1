"""Training: trainers, the parameters that they train, and launchers of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..process.scheduling import Scheduler
from .option_checks import check_options_class

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ..reporting import LaunchResult, Reporter
    from ..text.token_store import TokenBlocks


class PrivateReleases(Protocol):
    """Differentially private statistics of private text for trainers before training; each spends epsilon."""

    @property
    def releases_embedding(self) -> bool:
        """Whether the owner wants an embedding released (`dp.embedding_noise` is set)."""
        ...

    def embedding_mean(self, rows: Iterable[Tensor], clip: float) -> Tensor:
        """Return the noisy mean of vectors (n,), one for each block of the text, each clipped to norm `clip`."""
        ...


class TrainablePart:
    """Module and trainable parameters of a run; subclass it for own losses, measures or files (all have defaults)."""

    used_in_a_pass: Literal["all", "same", "some"] = "all"
    """Which trained parameters have a gradient after a pass: all, always the same ones, or some that depend on the text.
    Several processes have to look for the others, and cannot shard a model in which they differ (`some`)."""
    keeps_float32 = False
    """Whether the trained parameters stay in float32 if `training.precision` stores weights in bfloat16."""
    spares_activations = False
    """Whether activations are computed again and logits are computed in pieces if the run's settings do not say. For few
    parameters, which need little memory themselves."""
    auxiliary_per_example = False
    """Whether `auxiliary_loss` is a mean over the batch of terms that each depend on one example, as training with
    differential privacy needs."""

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        config: Mapping[str, Any] | None = None,
        shares: Mapping[str, float] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.module = module
        """Called as `module(input_ids=..., use_cache=False)`; returns an object with `.logits` of shape (B, T, V)."""
        self.parameters = parameters
        """All trained parameters, by their names in the model in memory."""
        self.config = config or {}
        """Fields of the generalist's manifest that differ from its base (`GeneralistConfig`), such as `method`, `kind`
        and `weights`. Under `tuning`: fields of this run's `Tuning`, such as `trained_inside` and `copied_from`."""
        self.shares = shares
        """Fraction of the blocks that each domain of the run contributes; None: equal."""
        self.notes = notes
        """Lines shown to the user when the run begins."""

    def begin_step(self, step: int) -> None:
        """Prepare an optimiser step, after `step` finished ones."""

    def begin_batch(self, domains: Sequence[int]) -> None:
        """Prepare a forward pass; `domains` has the index of the run's domain for each row.

        Domains that only the annealing of an expert has come after those of the run.
        """

    def auxiliary_loss(self) -> Tensor | None:
        """Return the loss, shape (), to add to the cross-entropy of the last forward pass."""
        return None

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a gradient per example cannot be computed because of the auxiliary loss."""
        return type(self).auxiliary_loss is not TrainablePart.auxiliary_loss and not self.auxiliary_per_example

    def measures(self) -> Mapping[str, float]:
        """Return numbers of the last forward pass to log beside the loss; called for logged steps."""
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors of the artefact, by their names in the starting model in memory; changed ones are stored.

        An adapter has none: its tensors are those of `extra_tensors`.
        """
        tensors: Mapping[str, Tensor] = self.module.state_dict()
        return tensors

    def extra_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return further tensors of the artefact, by file and name, that the starting model does not have."""
        return {}

    def write_model(self, folder: Path, base: Path) -> None:
        """Write the model's files into the folder of a generalist; `base` is the model that training started from."""
        from ..artefacts.safetensors_io import stored_dtype

        self.module.to("cpu", stored_dtype(base))
        self.module.save_pretrained(folder)  # type: ignore[operator]  # a transformers model


@dataclass(frozen=True)
class TrainingText:
    """The text of a run, as a trainer may read it before training begins."""

    domains: Mapping[str, TokenBlocks]
    """Training parts of the run's own domains."""
    other: Callable[[str], TokenBlocks]
    """Returns the training part of another domain of the project; raises `UserError` if there is none of that name."""
    seed_domains: tuple[str, ...]
    """Domains of the project that the seed was pretrained on."""
    folder: Path
    """Folder of the model that training starts from."""
    private: PrivateReleases | None = None
    """Set for private runs, where nothing that depends on `domains` may be used except through this."""


@dataclass(frozen=True)
class TrainingContext:
    """Everything that a trainer may use to prepare a run."""

    model: PreTrainedModel
    """The model that training starts from, on the CPU."""
    options: Any = None
    """The trainer's options."""
    text_or_none: TrainingText | None = None
    """The run's text; None unless the trainer declares `uses_text`."""
    blocks_per_step: int | None = None
    """Number of blocks in an optimiser step, of all accumulated batches; None if it is not known."""
    models: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the models that `Trainer.models` named, verified."""

    @property
    def text(self) -> TrainingText:
        """The run's text; only for trainers that declare `uses_text`."""
        if self.text_or_none is None:
            raise ValueError("this trainer does not declare uses_text, so no text is passed to it")
        return self.text_or_none


@dataclass(frozen=True)
class Trainer:
    """A choice of trainable parameters, and how they are prepared."""

    name: str
    summary: str
    prepare: Callable[[TrainingContext], TrainablePart]
    """`prepare(context)` freezes the other parameters of the model and returns the trainable ones."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""
    reads_weights: bool = True
    """Whether `prepare` reads or writes weights. If not, processes that share a model may pass it on the meta device, without
    weights, and read only their parts of them afterwards."""
    uses_text: bool = False
    """Whether it reads `TrainingContext.text` before training begins."""
    private_text: bool = False
    """With `uses_text`: whether it reads the run's own domains only through `TrainingText.private`. Private runs refuse
    other trainers that use text."""
    makes: Literal["expert", "adapter", "generalist"] = "expert"
    """Result of a run: the tensors that changed (`branch` and `train`), an adapter of the seed (likewise; its folder has
    `adapter_config.json` and `adapter_model.safetensors`), or a whole model (`tune`)."""
    restore: Callable[[PreTrainedModel, Path], PreTrainedModel] | None = None
    """`restore(model, folder)` turns the starting model into the trained one, from an expert's folder; None: the
    expert's tensors replace those of the same name."""
    require: Callable[[Path, Any, Sequence[str]], None] | None = None
    """`require(folder, options, domains)` raises `UserError` for a model, options or domains that it cannot train, before a
    run is set up and anything is replaced; the model is the seed or, with `makes="generalist"`, the one to tune."""
    models: Callable[[Any], tuple[str, ...]] | None = None
    """`models(options)` names the other models of the project that `prepare` reads, which become parents of what is trained.
    None: it reads none."""
    context_tokens: Callable[[Path, Any], int] | None = None
    """`context_tokens(seed, options)` returns how many positions of the model's context a trained prompt takes from the text.
    None: none."""
    changes: Literal["all", "feed_forward"] = "all"
    """Tensors of the starting model that training can change; an expert that is delivered to a federation has to have all
    matrices among them, and nothing else."""
    side_files: Callable[[Path, Any], Mapping[str, Mapping[str, SideTensor]]] | None = None
    """`side_files(seed, options)`: the files and tensors of `TrainablePart.extra_tensors`, against which delivered experts
    are checked; None: the part has no such tensors."""
    side_documents: Callable[[Path, Any], Mapping[str, Mapping[str, Any]]] | None = None
    """`side_documents(seed, options)`: JSON files of an expert by name, such as the configuration of an adapter; a delivered
    expert has to have the same. None: it has none."""

    def __post_init__(self) -> None:
        check_options_class(self.options, f"trainer '{self.name}'")


@dataclass(frozen=True)
class SideTensor:
    """A tensor that an expert has in a file beside the model's, such as a router row."""

    shape: tuple[int, ...]
    least: float
    """Smallest value that training can give it."""
    largest: float
    is_required: bool = True
    dtype: str | None = None
    """safetensors' name of its dtype; None: any of floating-point numbers."""


@dataclass(frozen=True)
class Launcher:
    """Starts training runs: as local processes (`launch`), or as jobs of a cluster (`scheduler`); it has one of the two."""

    name: str
    summary: str
    launch: Callable[[Sequence[Path], int, Reporter, Any], list[LaunchResult]] | None = None
    """`launch(runs, jobs, reporter, options)` trains every run folder, at most `jobs` at a time, and returns when all
    have ended. A run that fails must not affect the others."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""
    scheduler: Callable[[Any], Scheduler] | None = None
    """`scheduler(options)` returns the queue to which runs are submitted; expertctl follows and restarts their jobs."""
    fitting_jobs: Callable[[Sequence[Path], Any], int] | None = None
    """With `launch`: `fitting_jobs(runs, options)` returns how many of the runs can train at a time (`--jobs auto`)."""

    def __post_init__(self) -> None:
        check_options_class(self.options, f"launcher '{self.name}'")
        if (self.launch is None) == (self.scheduler is None):
            raise ValueError(f"launcher '{self.name}' needs either `launch` or `scheduler`")
