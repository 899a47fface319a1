"""Merging: merge methods and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..reporting import SILENT, Reporter
from .option_checks import check_options_class

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..manifests.generalist import GeneralistKind, MixtureRecord
    from .text import ValidationText


@dataclass(frozen=True)
class KeptElements:
    """How many elements of a task vector a merge keeps, counted without those that are 0."""

    kept: int
    wanted: int
    """Number according to the options; `kept` can be larger if elements have the same magnitude."""
    size: int
    """Number of all elements."""

    def __add__(self, other: KeptElements) -> KeptElements:
        return KeptElements(self.kept + other.kept, self.wanted + other.wanted, self.size + other.size)


def _uncounted(expert: str, elements: KeptElements) -> None:
    """Default of `TensorGroup.tally`."""


@dataclass(frozen=True)
class TensorGroup:
    """One tensor of the seed and of every expert: the input of a per-tensor merge method.

    All have one shape. They are float32 (float64 if the files hold float64); the engine rounds once, when writing. They
    are torch tensors, or numpy arrays if the method accepts any (`TensorMerge.arrays`). A method must not change them.
    """

    name: str
    experts: tuple[Tensor, ...]
    """In the order of `expert_names`."""
    expert_names: tuple[str, ...]
    weights: tuple[float, ...]
    """Weight of each expert; see `MergeMethod.weights`."""
    seed_or_none: Tensor | None = None
    """None if the method does not use the seed (`TensorMerge.uses_seed`); otherwise read `seed`."""
    statistics: tuple[Tensor | None, ...] = ()
    """Statistics from `expertctl stats`, one per expert, if the method requests them."""
    survey: Any = None
    """Result of the method's `Survey`, if it has one that its options need."""
    tally: Callable[[str, KeptElements], None] = _uncounted
    """`tally(expert, elements)` counts the kept elements of an expert in this tensor, for a note to the user."""

    @property
    def seed(self) -> Tensor:
        """The seed's tensor."""
        if self.seed_or_none is None:
            raise ValueError(f"'{self.name}' has no seed tensor, because the method declares uses_seed=False")
        return self.seed_or_none


PerExpert = float | tuple[float, ...]
"""An option that may differ between experts: one number for all, or a tuple with one number per expert."""


@dataclass(frozen=True)
class BuiltModel:
    """The weights and options of a model that a merge method built."""

    weights: Mapping[str, float] | None = None
    """Weight of each expert; empty if weights depend on the text; None: the merge's weights."""
    resolved_options: Mapping[str, Any] = field(default_factory=dict)
    """Options that the method resolved, in the form in which users give them."""


@dataclass(frozen=True)
class MergeMethod:
    """A method that merges seed and experts into a generalist: a `TensorMerge`, an `Assembler` or a `ModelBuilder`."""

    name: str
    summary: str
    _: KW_ONLY
    options: type | None = None
    """A frozen dataclass with a default for every field, or None. Users leave out a trailing underscore (`lambda_`)."""
    options_for: Callable[[Mapping[str, Any]], type] | None = None
    """Instead of `options`, if their class depends on the value of one of them: returns the class."""
    kind: GeneralistKind = "average"
    """Kind of generalist."""
    weights: Literal["shares", "factors"] = "shares"
    """`shares`: at least 0, summing to 1. `factors`: any numbers, 1 for each expert by default."""
    expert_count: tuple[int, int | None] = (1, None)
    """Minimum and maximum number of experts; None: no limit."""
    auto_classes: Callable[[], tuple[type, type]] | None = None
    """Returns (configuration class, model class), for models that transformers has no class for."""
    switch_off: Callable[[Any, Sequence[str], Collection[str]], PreTrainedModel] | None = None
    """`switch_off(model, experts, disabled)` returns a loaded model without some of its `experts` (all, in order)."""

    def options_class(self, values: Mapping[str, Any]) -> type | None:
        """Return the class of the options for the given values."""
        return self.options_for(values) if self.options_for is not None else self.options

    def __post_init__(self) -> None:
        if type(self) is MergeMethod:
            raise ValueError(
                f"merge method '{self.name}' is a plain MergeMethod; use TensorMerge, Assembler or ModelBuilder"
            )
        check_options_class(self.options, f"merge method '{self.name}'")


@dataclass(frozen=True)
class Survey:
    """What a method has to know of all tensors before it merges the first one, such as a threshold for whole models.

    All tensors are read once for each state of the survey, from several threads and in any order.
    """

    is_needed: Callable[[Any], bool]
    """`is_needed(options)` of a tensor."""
    begin: Callable[[Sequence[tuple[Sequence[str], Any]], bool], Any]
    """`begin(settings, is_double)` returns the first state, from the expert names and options of every merged tensor,
    and whether any of the tensors is float64. Raises `UserError` for settings that differ between tensors and must not.
    Called while the merge is planned, too."""
    measure: Callable[[TensorGroup, Any], Mapping[str, NDArray[Any]]]
    """`measure(group, state)` returns integers by name, which are summed over all tensors."""
    advance: Callable[[Any, Mapping[str, NDArray[Any]], Mapping[str, int]], Any]
    """`advance(state, sums, sizes)` returns the next state; `sizes` holds the number of elements of each expert,
    unchanged tensors included."""
    is_complete: Callable[[Any], bool]
    """`is_complete(state)`: whether the state is the result, which becomes `TensorGroup.survey`."""
    kept: Callable[[Any], Mapping[str, KeptElements]]
    """`kept(result)` returns how many elements of each expert are kept."""


@dataclass(frozen=True)
class TensorMerge(MergeMethod):
    """Merges tensor by tensor; the engine reads, streams and writes.

    Every number in its options may be set per layer and per module, a field annotated `PerExpert` per expert too.
    """

    merge: Callable[[TensorGroup, Any], Tensor]
    """`merge(group, options)` returns the merged tensor. Pure; called once for each floating-point tensor, from
    several threads at once."""
    _: KW_ONLY
    uses_seed: bool | Callable[[Any], bool] = True
    """Whether `merge` reads the seed's tensors; a function of the options where it depends on them."""
    elementwise: bool = False
    """Whether every element of the result depends only on the same element of the inputs, so that the engine may pass
    a tensor in flat pieces and never holds it whole."""
    keeps_seed: bool = True
    """Whether experts equal to the seed give the seed for any options; the engine then copies such tensors unread."""
    arrays: Literal["torch", "any"] = "torch"
    """`any`: works on numpy arrays as well, so that torch need not be imported for a merge on a CPU."""
    statistics: str | None = None
    """Kind of statistics (`gram`, `fisher`) that it needs from `expertctl stats`, or None."""
    survey: Survey | None = None
    """What it has to know of all tensors first, or None."""


class OpenedModel(Protocol):
    """One model of a merge, opened by its manifest and the headers of its files."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def kind(self) -> str:
        """`seed`, `expert`, `generalist`, `adapter`, or `model` for any other Hugging Face folder."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """Content of `config.json`."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        ...


class PlannedTensor(Protocol):
    """One tensor of a planned model, with the place of everything that it is made from."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str:
        """safetensors' name: `F32`, `BF16` ..."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class AssemblyInputs(Protocol):
    """The models of a merge and the text that an `Assembler` may fit a router on."""

    @property
    def sources(self) -> Mapping[str, OpenedModel]:
        """All models by name, the seed included."""
        ...

    @property
    def leading(self) -> OpenedModel:
        """The seed, or the first model of a merge without a seed."""
        ...

    @property
    def expert_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Expert name -> options that are set for this expert only."""
        ...

    @property
    def validation(self) -> Callable[[], Sequence[ValidationText]] | None:
        """Returns validation text; None: plan only, without fitting."""
        ...

    @property
    def reporter(self) -> Reporter: ...


class Assembly(Protocol):
    """The plan of an assembled model."""

    @property
    def tensors(self) -> Sequence[PlannedTensor]: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """Content of `config.json`."""
        ...

    @property
    def experts(self) -> tuple[str, ...]:
        """Expert names in the order of the router rows."""
        ...

    @property
    def record(self) -> MixtureRecord:
        """Manifest entry."""
        ...

    @property
    def is_fitted(self) -> bool:
        """Whether the router is final; otherwise, it needs a model or text that planning does not read."""
        ...


@dataclass(frozen=True)
class Assembler(MergeMethod):
    """Assembles the experts' tensors into a model of another class; the engine copies and writes them."""

    assemble: Callable[[AssemblyInputs, Any], Assembly]
    """`assemble(inputs, options)` returns the plan of the model; it reads no tensors."""
    _: KW_ONLY
    kind: GeneralistKind = "moe"


@dataclass(frozen=True)
class ModelBuilder(MergeMethod):
    """Builds a model of another kind, such as an ensemble, from whole models."""

    build: Callable[[MergeInputs, Any, Path], BuiltModel | None]
    """`build(inputs, options, folder)` writes a loadable model into `folder`; the result may replace weights and options."""
    _: KW_ONLY
    takes_models: bool = False
    """Whether it takes any model with the seed's tokenizer, not only experts of the seed."""
    takes_prompts: bool = False
    """Whether experts may be prompts, which change no tensor of the seed."""


@dataclass(frozen=True)
class MergeInputs:
    """Everything that a `ModelBuilder` may read."""

    seed: Path
    """The seed's folder."""
    experts: Mapping[str, Path]
    """Expert folders by name, in the order the user gave."""
    weights: Mapping[str, float]
    """Weight of each expert; they sum to 1."""
    weights_given: bool = False
    """Whether the user set the weights."""
    validation: Callable[[], Sequence[ValidationText]] = tuple
    """Returns the validation text for fitting priors, temperatures and weights, prepared on first use; empty if the
    merge has none."""
    reporter: Reporter = SILENT
    """Receives messages for the user."""
