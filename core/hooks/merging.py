"""Merging: merge methods and what they read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .option_checks import check_options_class

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .text import ValidationText


@dataclass(frozen=True)
class TensorGroup:
    """One tensor of the seed with the same tensor of every expert: all a per-tensor merge method sees.

    All of one shape, and float32 whatever the files hold (float64 where they hold that): the engine rounds once,
    when it writes. They are torch tensors, or numpy arrays where the method takes any (`MergeMethod.arrays`).
    A method must not change them.
    """

    name: str
    experts: tuple[Tensor, ...]
    """In the order of `expert_names`."""
    expert_names: tuple[str, ...]
    weights: tuple[float, ...]
    """One for each expert; what they mean says `MergeMethod.weights`."""
    seed_or_none: Tensor | None = None
    """None where the method does without (`MergeMethod.uses_seed`); all others read `seed`."""
    statistics: tuple[Tensor | None, ...] = ()
    """What `expertctl stats` gathered on this tensor, one for each expert, where the method asks for it."""

    @property
    def seed(self) -> Tensor:
        """The seed's tensor."""
        if self.seed_or_none is None:
            raise ValueError(f"there is no seed for '{self.name}': the method says that it does without")
        return self.seed_or_none


PerExpert = float | tuple[float, ...]
"""An option that may differ between experts: one number for all, or one for each, in their order."""


@dataclass(frozen=True)
class BuiltModel:
    """How a model came out that a merge method built."""

    weights: Mapping[str, float] | None = None
    """How much each expert counts; empty where that differs from text to text; None: the merge's weights."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """Options that the method chose by itself, as a user would give them to get the same model."""


@dataclass(frozen=True)
class MergeMethod:
    """A way from seed and experts to a generalist.

    Offer `merge` for a method that works tensor by tensor (the engine reads, streams and writes), `assemble` for one
    that puts experts' tensors together as a model of another class (the engine copies), or `build` for one that
    makes a model of its own kind.
    """

    name: str
    summary: str
    merge: Callable[[TensorGroup, Any], Tensor] | None = None
    """`merge(group, options)` returns the merged tensor. Pure; called once for each floating-point tensor, from
    several threads at once."""
    build: Callable[[MergeInputs, Any, Path], BuiltModel | None] | None = None
    """`build(inputs, options, folder)` writes a loadable model folder into `folder`, and may say how it came out."""
    kind: str = "average"
    """What comes out: `average`, `ensemble`, `moe` or `stitched`."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None. Every number in it may be set per layer and per
    module; a field annotated `PerExpert` per expert too. A trailing underscore (`lambda_`) is left out by users."""
    assemble: Callable[[Any, Any], Any] | None = None
    """`assemble(inputs, options)` plans a model of another architecture from the tensors of the experts: takes
    `merge.mixture.inputs.AssemblyInputs`, returns `merge.mixture.assembly.Assembly`; the engine reads and writes."""
    auto_classes: Callable[[], tuple[type, type]] | None = None
    """For a method whose model is no class of transformers: returns (config class, model class)."""
    uses_seed: bool | Callable[[Any], bool] = True
    """Whether `merge` reads the seed's tensors; a function of the options where it depends on them."""
    elementwise: bool = False
    """Every number of the result depends only on the same place of the inputs, so that the engine may hand over a
    tensor in pieces (flat ones) and never holds it whole."""
    keeps_seed: bool = True
    """Experts that all equal the seed give the seed, whatever the options; such tensors are copied unread."""
    arrays: Literal["torch", "any"] = "torch"
    """`any`: works on numpy arrays and torch tensors alike, and is spared the import of torch on a CPU."""
    weights: Literal["shares", "factors"] = "shares"
    """`shares`: at least 0, summing to 1. `factors`: as given, of any sign, 1 for each expert when not given."""
    expert_count: tuple[int, int | None] = (1, None)
    """Fewest and most experts that it can merge; None: no limit."""
    switch_off: Callable[[Any, Sequence[str], Collection[str]], PreTrainedModel] | None = None
    """`switch_off(model, experts, gone)` returns a loaded model without some of its `experts` (all, in order)."""
    takes_models: bool = False
    """Whether `build` takes any folder of a model with the seed's tokenizer, not only experts of the seed."""
    statistics: str | None = None
    """Kind of statistics (`gram`, `fisher`) that it needs from `expertctl stats`, or None."""

    def __post_init__(self) -> None:
        offered = [name for name in ("merge", "build", "assemble") if getattr(self, name) is not None]
        if len(offered) != 1:
            what = " and ".join(f"'{name}'" for name in offered) or "none"
            raise ValueError(
                f"merge method '{self.name}' offers {what} of 'merge', 'build' and 'assemble'; exactly one is needed"
            )
        check_options_class(self.options, f"merge method '{self.name}'")


@dataclass(frozen=True)
class MergeInputs:
    """Everything a `build` merge method may read."""

    seed: Path
    """The seed's folder."""
    experts: Mapping[str, Path]
    """Expert folders by name, in the order the user gave."""
    weights: Mapping[str, float]
    """One for each expert, summing to 1."""
    weights_given: bool = False
    """Whether the user asked for these weights, or they are the default."""
    validation: Callable[[], Sequence[ValidationText]] = tuple
    """Returns what priors, temperatures and weights may be fitted on, preparing it when it is first asked for;
    empty when the merge was given none."""
    say: Callable[[str], None] = field(default=lambda line: None)
    """Tells the user what is going on, a line at a time."""
