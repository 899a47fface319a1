"""What every tensor of a merge is made of: layers, names, shapes and dtypes of all sources are looked up and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...core.artefacts.numeric import FLOATING
from ...core.errors import UserError
from ...core.hooks.merging import MergeMethod
from ..engine.tensor_plan import Action, TensorPlan
from ..recipes.recipe import OutputSlice, Recipe, SourceSlice
from ..sources.models import DERIVED, Source, StoredTensor
from ..sources.tensor_names import HEADS, LayerNames, embedding_name, head_name, layer_names
from .tensor_settings import TensorSettings


@dataclass(frozen=True)
class Stack:
    """The output's layers and where they come from."""

    tensors: tuple[TensorPlan, ...]
    layers: tuple[tuple[str, int], ...]
    """For each layer, the leading model of its slice and the layer's number there."""


def plan_tensors(
    recipe: Recipe,
    method: MergeMethod,
    sources: Mapping[str, Source],
    vocabulary_rows: int | None = None,
    statistics: Mapping[str, Mapping[str, StoredTensor]] | None = None,
) -> Stack:
    """Return what every tensor of the output is made of.

    `vocabulary_rows` is how many rows the output's embedding has where tokenizers differ; `statistics` holds, by
    model and tensor, what the method asks for. Raises `UserError`, naming tensor and both sides, where sources
    differ in layers, names, shapes or dtypes, and for parameters that the method does not have or that have
    impossible values.
    """
    return _Planner(recipe, method, sources, vocabulary_rows, statistics or {}).plan()


class _Planner:
    """Walks the output's layers and looks up where each tensor comes from."""

    def __init__(
        self,
        recipe: Recipe,
        method: MergeMethod,
        sources: Mapping[str, Source],
        vocabulary_rows: int | None,
        statistics: Mapping[str, Mapping[str, StoredTensor]],
    ) -> None:
        self.recipe, self.method, self.sources = recipe, method, sources
        self.vocabulary_rows, self.statistics = vocabulary_rows, statistics
        self.names = {name: layer_names(source.tensors) for name, source in sources.items()}
        self.settings = TensorSettings(recipe, method)

    def plan(self) -> Stack:
        slices = self.recipe.slices
        widths = [self._width(part) for part in slices]
        for part in slices:
            self._check_count(part)
        leading = self.names[slices[0].sources[0].model]
        plans = [self._outside(name, slices[0]) for name in leading.before]
        layers: list[tuple[str, int]] = []
        for part, width in zip(slices, widths, strict=True):
            for offset in range(width):
                depth = offset / (width - 1) if width > 1 else 1.0
                plans += self._layer(part, offset, leading, len(layers), depth)
                layers.append((part.sources[0].model, _begin(part.sources[0]) + offset))
        plans += [self._outside(name, slices[-1]) for name in self._after(slices[-1])]
        return Stack(tuple(plan for plan in plans if plan is not None), tuple(layers))

    def _after(self, part: OutputSlice) -> list[str]:
        """Return the tensors that follow the layers, with an output head if any source has one of its own."""
        found = list(self.names[part.sources[0].model].after)
        heads = [head_name(self.sources[one.model].tensors) for one in part.sources]
        return found + [head for head in dict.fromkeys(heads) if head is not None and head not in found]

    def _outside(self, name: str, part: OutputSlice) -> TensorPlan | None:
        return self._tensor(name, part, {one.model: name for one in self._with_seed(part)}, 0.0)

    def _layer(
        self, part: OutputSlice, offset: int, leading: LayerNames, target: int, depth: float
    ) -> list[TensorPlan | None]:
        first = part.sources[0]
        taken = {one.model: _begin(one) + offset for one in self._with_seed(part)}
        plans = []
        rests = self.names[first.model].layers[taken[first.model]]
        for rest in rests:
            inputs = {model: self.names[model].name(layer, rest) for model, layer in taken.items()}
            plans.append(self._tensor(leading.name(target, rest), part, inputs, depth))
        for model, layer in taken.items():
            for rest in self.names[model].layers[layer]:
                if rest not in rests and not rest.endswith(DERIVED):
                    raise self._missing(self.names[model].name(layer, rest), model, first.model)
        return plans

    def _with_seed(self, part: OutputSlice) -> tuple[SourceSlice, ...]:
        """Return a slice's sources and, at the same layers, the seed where the method needs it."""
        seed = self._seed_of(part)
        if seed is None or any(one.model == seed for one in part.sources):
            return part.sources
        if len({one.layers for one in part.sources}) > 1:
            raise UserError(
                f"the sources of a slice take different layers, and its seed '{seed}' is none of them; name the "
                "seed among the sources with the layers it gives"
            )
        return (*part.sources, SourceSlice(seed, part.sources[0].layers))

    def _seed_of(self, part: OutputSlice) -> str | None:
        return part.seed if part.seed is not None else self.recipe.seed

    def _width(self, part: OutputSlice) -> int:
        """Return how many layers a slice has; raises `UserError` when its sources do not agree."""
        sizes = {}
        for one in self._with_seed(part):
            there = len(self.names[one.model].layers)
            begin, end = one.layers if one.layers is not None else (0, there)
            if not 0 <= begin < end <= there and (begin, end) != (0, 0):
                raise UserError(
                    f"layer_range [{begin}, {end}] of '{one.model}' is impossible: {self._where(one.model)} has "
                    f"{there} layers"
                )
            sizes[one.model] = end - begin
        first = part.sources[0].model
        for model, size in sizes.items():
            if size != sizes[first]:
                raise UserError(
                    f"'{model}' has {size} layers where '{first}' has {sizes[first]}; models of different depth "
                    "cannot be merged tensor by tensor"
                )
        return sizes[first]

    def _check_count(self, part: OutputSlice) -> None:
        count = len(self._experts(part))
        fewest, most = self.method.expert_count
        if count < fewest or (most is not None and count > most):
            wanted = (
                f"{fewest}"
                if fewest == most
                else f"{fewest} or more"
                if most is None
                else f"{fewest} to {most}"
            )
            raise UserError(
                f"merge method '{self.method.name}' takes {wanted} experts, and here are {count}: "
                f"{', '.join(one.model for one in self._experts(part)) or 'none'}"
            )

    def _experts(self, part: OutputSlice) -> list[SourceSlice]:
        return [one for one in part.sources if one.model != self._seed_of(part)]

    def _tensor(
        self, name: str, part: OutputSlice, inputs: Mapping[str, str], depth: float
    ) -> TensorPlan | None:
        first = part.sources[0].model
        stored = {model: self._stored(model, tensor) for model, tensor in inputs.items()}
        absent = [model for model, one in stored.items() if one is None]
        if absent:
            if name.endswith(DERIVED):
                return None
            there = next((model for model, one in stored.items() if one is not None), first)
            raise self._missing(inputs[absent[0]], there, absent[0])
        experts = self._experts(part)
        found = {model: one for model, one in stored.items() if one is not None}
        is_vocabulary = self._is_vocabulary(found)
        self._check_alike(inputs, found, is_vocabulary)
        merged = tuple(found[one.model] for one in experts)
        seed = self._seed_of(part)
        depends = [*merged, *([found[seed]] if seed is not None else [])]
        shape = merged[0].shape if not is_vocabulary else (self._rows(), *merged[0].shape[1:])
        action: Action = "merge"
        if merged[0].dtype not in FLOATING:
            action = "agree"
        elif (
            self.method.keeps_seed
            and len(set(depends)) == 1
            and (seed is not None or self.method.uses_seed is False)
            and not is_vocabulary
        ):
            action = "copy"
        plan = TensorPlan(
            name=name,
            dtype=self._dtype(merged[0]) if action != "agree" else merged[0].dtype,
            shape=shape,
            action=action,
            experts=merged,
            expert_names=tuple(one.model for one in experts),
            is_vocabulary=is_vocabulary,
        )
        if action != "merge":
            return plan
        if self.method.statistics is not None:
            known = [self.statistics.get(one.model, {}).get(inputs[one.model]) for one in experts]
            plan = replace(plan, statistics=tuple(known))
        origin = found[seed] if seed is not None else None
        return self.settings.laid_over(replace(plan, seed_name=seed), part, experts, inputs, depth, origin)

    def _rows(self) -> int:
        assert self.vocabulary_rows is not None
        return self.vocabulary_rows

    def _dtype(self, one: StoredTensor) -> str:
        return self.recipe.dtype or self.recipe.input_dtype or one.dtype

    def _stored(self, model: str, tensor: str) -> StoredTensor | None:
        """Return a model's tensor; an output head that is tied is its embedding."""
        tensors = self.sources[model].tensors
        if (
            tensor not in tensors
            and tensor in HEADS
            and self.sources[model].config.get("tie_word_embeddings", True)
        ):
            embedding = embedding_name(tensors)
            return tensors[embedding] if embedding is not None else None
        return tensors.get(tensor)

    def _is_vocabulary(self, found: Mapping[str, StoredTensor]) -> bool:
        return self.vocabulary_rows is not None and all(
            one.name.endswith("weight") and one.name in self._vocabulary_names(model)
            for model, one in found.items()
        )

    def _vocabulary_names(self, model: str) -> tuple[str | None, ...]:
        tensors = self.sources[model].tensors
        return embedding_name(tensors), head_name(tensors)

    def _check_alike(
        self, inputs: Mapping[str, str], found: Mapping[str, StoredTensor], is_vocabulary: bool
    ) -> None:
        first = next(iter(found))
        skip = 1 if is_vocabulary else 0
        for model, one in found.items():
            ours = found[first]
            if one.shape[skip:] != ours.shape[skip:]:
                raise UserError(
                    f"tensor '{inputs[model]}' is {list(one.shape)} in {self._where(model)}, but "
                    f"{list(ours.shape)} in {self._where(first)}"
                )
            if one.dtype != ours.dtype and (self.recipe.dtype is None or not _both_floating(one, ours)):
                mend = "; say in which to write: --dtype bfloat16" if _both_floating(one, ours) else ""
                raise UserError(
                    f"tensor '{inputs[model]}' is {one.dtype} in {self._where(model)}, but {ours.dtype} in "
                    f"{self._where(first)}{mend}"
                )

    def _missing(self, tensor: str, there: str, absent: str) -> UserError:
        return UserError(
            f"tensor '{tensor}' is in {self._where(there)}, but not in {self._where(absent)}; models of different "
            "architectures cannot be merged tensor by tensor"
        )

    def _where(self, model: str) -> str:
        return f"'{model}' ({self.sources[model].folder})"


def _begin(one: SourceSlice) -> int:
    return one.layers[0] if one.layers is not None else 0


def _both_floating(one: StoredTensor, other: StoredTensor) -> bool:
    return one.dtype in FLOATING and other.dtype in FLOATING
