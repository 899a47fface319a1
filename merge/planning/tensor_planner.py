"""Plans every tensor of a merge and checks layers, names, shapes and dtypes of all sources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...core.artefacts.model_config import is_tied
from ...core.artefacts.numeric import FLOATING
from ...core.errors import UserError
from ...core.hooks.merging import TensorMerge
from ..engine.surveying import begin_survey
from ..engine.tensor_plan import Action, TensorPlan
from ..recipes.places import placed
from ..recipes.recipe import OutputSlice, Recipe, SourceSlice
from ..sources.models import DERIVED, Source, StoredTensor
from ..sources.statistics import Statistics
from ..sources.tensor_names import HEADS, LayerNames, embedding_name, head_name, layer_names
from .tensor_settings import TensorSettings


@dataclass(frozen=True)
class Stack:
    """The tensors and layers of the output."""

    tensors: tuple[TensorPlan, ...]
    layers: tuple[tuple[str, int], ...]
    """For each output layer, the first model of its slice and the layer index in that model."""


def plan_tensors(
    recipe: Recipe,
    method: TensorMerge,
    sources: Mapping[str, Source],
    vocabulary_rows: int | None = None,
    statistics: Statistics | None = None,
) -> Stack:
    """Return the plans of all output tensors.

    `vocabulary_rows` is the number of embedding rows of the output if tokenizers differ. `statistics` holds the
    statistics that the method needs, by model and tensor. Raises `UserError` with the tensor and both values if sources
    differ in layers, names, shapes or dtypes, and for unknown parameters or invalid values.
    """
    return _Planner(recipe, method, sources, vocabulary_rows, statistics or {}).plan()


class _Planner:
    """Walks over the output layers and plans each tensor."""

    def __init__(
        self,
        recipe: Recipe,
        method: TensorMerge,
        sources: Mapping[str, Source],
        vocabulary_rows: int | None,
        statistics: Statistics,
    ) -> None:
        self.recipe, self.method, self.sources = recipe, method, sources
        self.vocabulary_rows, self.statistics = vocabulary_rows, statistics
        self.names = {name: layer_names(source.tensors) for name, source in sources.items()}
        self.settings = TensorSettings(recipe, method)

    def plan(self) -> Stack:
        slices = self.recipe.slices
        widths = []
        for output_slice in slices:
            with placed(output_slice.place):
                widths.append(self._width(output_slice))
        for output_slice in slices:
            with placed(output_slice.place):
                self._check_count(output_slice)
        leading = self.names[slices[0].sources[0].model]
        plans = [self._outer_tensor(name, slices[0]) for name in leading.before]
        layers: list[tuple[str, int]] = []
        for output_slice, width in zip(slices, widths, strict=True):
            for offset in range(width):
                depth = offset / (width - 1) if width > 1 else 1.0
                with placed(output_slice.place):
                    plans += self._layer_tensors(output_slice, offset, leading, len(layers), depth)
                layers.append((output_slice.sources[0].model, _first_layer(output_slice.sources[0]) + offset))
        plans += [self._outer_tensor(name, slices[-1]) for name in self._after(slices[-1])]
        tensors = tuple(plan for plan in plans if plan is not None)
        begin_survey(self.method, tensors)  # refuses options that differ between tensors
        return Stack(tensors, tuple(layers))

    def _after(self, output_slice: OutputSlice) -> list[str]:
        """Return the tensors after the layers, with the output head if any source has an untied one."""
        names = list(self.names[output_slice.sources[0].model].after)
        heads = [head_name(self.sources[source.model].tensors) for source in output_slice.sources]
        return names + [head for head in dict.fromkeys(heads) if head is not None and head not in names]

    def _outer_tensor(self, name: str, output_slice: OutputSlice) -> TensorPlan | None:
        with placed(output_slice.place):
            inputs = {source.model: name for source in self._with_seed(output_slice)}
            return self._tensor(name, output_slice, inputs, 0.0)

    def _layer_tensors(
        self, output_slice: OutputSlice, offset: int, leading: LayerNames, target: int, depth: float
    ) -> list[TensorPlan | None]:
        first = output_slice.sources[0]
        layer_of = {source.model: _first_layer(source) + offset for source in self._with_seed(output_slice)}
        plans = []
        inner_names = self.names[first.model].layers[layer_of[first.model]]
        for inner_name in inner_names:
            inputs = {model: self.names[model].name(layer, inner_name) for model, layer in layer_of.items()}
            plans.append(self._tensor(leading.name(target, inner_name), output_slice, inputs, depth))
        for model, layer in layer_of.items():
            for inner_name in self.names[model].layers[layer]:
                if inner_name not in inner_names and not f".{inner_name}".endswith(DERIVED):
                    raise self._missing_error(self.names[model].name(layer, inner_name), model, first.model)
        return plans

    def _with_seed(self, output_slice: OutputSlice) -> tuple[SourceSlice, ...]:
        """Return the sources of a slice, plus its seed with the same layers."""
        seed = self._seed_of(output_slice)
        if seed is None or any(source.model == seed for source in output_slice.sources):
            return output_slice.sources
        if len({source.layers for source in output_slice.sources}) > 1:
            raise UserError(
                f"the sources of a slice use different layers, and its seed '{seed}' is not one of them; add the seed to the "
                "sources with its layer range"
            )
        return (*output_slice.sources, SourceSlice(seed, output_slice.sources[0].layers))

    def _seed_of(self, output_slice: OutputSlice) -> str | None:
        return output_slice.seed if output_slice.seed is not None else self.recipe.seed

    def _width(self, output_slice: OutputSlice) -> int:
        """Return the number of layers of a slice; raises `UserError` if its sources differ."""
        sizes = {}
        for source in self._with_seed(output_slice):
            num_layers = len(self.names[source.model].layers)
            begin, end = source.layers if source.layers is not None else (0, num_layers)
            if not 0 <= begin < end <= num_layers and (begin, end) != (0, 0):
                with placed(source.place):
                    raise UserError(
                        f"layer_range [{begin}, {end}] of '{source.model}' is out of range: "
                        f"{self._describe(source.model)} has {num_layers} layers"
                    )
            sizes[source.model] = end - begin
        first = output_slice.sources[0].model
        for model, size in sizes.items():
            if size != sizes[first]:
                raise UserError(
                    f"'{model}' has {size} layers where '{first}' has {sizes[first]}; models of different depth "
                    "cannot be merged tensor by tensor"
                )
        return sizes[first]

    def _check_count(self, output_slice: OutputSlice) -> None:
        names = [source.model for source in self._experts(output_slice)]
        minimum, maximum = self.method.expert_count
        if minimum <= len(names) <= (maximum or math.inf):
            return
        wanted = f"{minimum} to {maximum}" if maximum is not None else f"{minimum} or more"
        wanted = str(minimum) if minimum == maximum else wanted
        raise UserError(
            f"merge method '{self.method.name}' takes {wanted} expert{'s' if wanted != '1' else ''}, but this merge has "
            f"{len(names)}: {', '.join(names) or 'none'}"
        )

    def _experts(self, output_slice: OutputSlice) -> list[SourceSlice]:
        return [source for source in output_slice.sources if source.model != self._seed_of(output_slice)]

    def _tensor(
        self, name: str, output_slice: OutputSlice, inputs: Mapping[str, str], depth: float
    ) -> TensorPlan | None:
        present = {model: stored for model, key in inputs.items() if (stored := self._stored(model, key)) is not None}
        absent = next((model for model in inputs if model not in present), None)
        if absent is not None:
            if f".{name}".endswith(DERIVED):
                return None
            raise self._missing_error(inputs[absent], next(iter(present), output_slice.sources[0].model), absent)
        experts = self._experts(output_slice)
        is_vocabulary = self._is_vocabulary(present)
        self._check_same_format(inputs, present, is_vocabulary)
        merged = tuple(present[source.model] for source in experts)
        first = merged[0]
        seed = self._seed_of(output_slice)
        seed_tensor = present[seed] if seed is not None else None
        is_shared = all(stored == first for stored in (*merged, seed_tensor or first))
        has_comparison = seed is not None or self.method.uses_seed is False
        action: Action = "merge"
        if first.dtype not in FLOATING:
            action = "require_equal"
        elif is_shared and has_comparison and self.method.keeps_seed and not is_vocabulary:
            action = "copy"
        dtype = self.recipe.dtype or self.recipe.input_dtype if action != "require_equal" else None
        rows = self.vocabulary_rows if is_vocabulary else None
        plan = TensorPlan(
            name=name,
            dtype=dtype or first.dtype,
            shape=(rows, *first.shape[1:]) if rows is not None else first.shape,
            action=action,
            experts=merged,
            expert_names=tuple(source.model for source in experts),
            is_vocabulary=is_vocabulary,
        )
        if action != "merge":
            return plan
        if self.method.statistics is not None:
            expert_statistics = [self.statistics.get(source.model, {}).get(inputs[source.model]) for source in experts]
            plan = replace(plan, statistics=tuple(expert_statistics))
        return self.settings.resolve_for(
            replace(plan, seed_name=seed), output_slice, experts, inputs, depth, seed_tensor
        )

    def _stored(self, model: str, tensor: str) -> StoredTensor | None:
        """Return a model's tensor, None if it has none; a tied output head is the embedding."""
        tensors = self.sources[model].tensors
        if tensor not in tensors and tensor in HEADS and is_tied(self.sources[model].config):
            embedding = embedding_name(tensors)
            return tensors[embedding] if embedding is not None else None
        return tensors.get(tensor)

    def _is_vocabulary(self, present: Mapping[str, StoredTensor]) -> bool:
        """Return whether the rows of a tensor belong to tokens of vocabularies that differ."""
        return self.vocabulary_rows is not None and all(
            stored.name.endswith("weight")
            and stored.name in (embedding_name(self.sources[model].tensors), head_name(self.sources[model].tensors))
            for model, stored in present.items()
        )

    def _check_same_format(
        self, inputs: Mapping[str, str], present: Mapping[str, StoredTensor], is_vocabulary: bool
    ) -> None:
        first, reference = next(iter(present.items()))
        skip = 1 if is_vocabulary else 0
        for model, stored in present.items():
            if stored.shape[skip:] != reference.shape[skip:]:
                raise UserError(
                    f"tensor '{inputs[model]}' is {list(stored.shape)} in {self._describe(model)}, but "
                    f"{list(reference.shape)} in {self._describe(first)}"
                )
            are_floating = stored.dtype in FLOATING and reference.dtype in FLOATING
            if stored.dtype != reference.dtype and not (are_floating and self.recipe.dtype is not None):
                hint = "; choose the output dtype, for example --dtype bfloat16" if are_floating else ""
                raise UserError(
                    f"tensor '{inputs[model]}' is {stored.dtype} in {self._describe(model)}, but {reference.dtype} in "
                    f"{self._describe(first)}{hint}"
                )

    def _missing_error(self, tensor: str, present: str, absent: str) -> UserError:
        return UserError(
            f"tensor '{tensor}' is in {self._describe(present)}, but not in {self._describe(absent)}; models of different "
            "architectures cannot be merged tensor by tensor"
        )

    def _describe(self, model: str) -> str:
        return f"'{model}' ({self.sources[model].folder})"


def _first_layer(source: SourceSlice) -> int:
    return source.layers[0] if source.layers is not None else 0
