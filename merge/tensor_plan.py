"""What every tensor of a merge is made of, decided and checked before one is read."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import UserError
from ..core.numeric import FLOATING
from ..core.options import NoOptions, parse_options, unknown_option
from ..core.safetensors_io import DTYPES, SINGLE_FILE, header_of_file
from ..core.types import MergeMethod, PerExpert
from .parameters import resolve
from .recipe import WEIGHT, OutputSlice, Recipe, Scope, SourceSlice
from .sources import DERIVED, HEADS, Source, StoredTensor, embedding_name, head_name
from .tensor_names import LayerNames, layer_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEFAULT_SHARD_BYTES = 5 * 10**9
Action = Literal["merge", "copy", "agree", "stack", "given"]


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor of the output comes about."""

    name: str
    dtype: str
    """Of the output."""
    shape: tuple[int, ...]
    action: Action
    """`merge` by the method; `copy` the first expert's, which all share; `agree`: what must be the same in all
    (integers, what training froze), copied once all were found equal; `stack`: all experts' end to end; `given`:
    `values`, from no file."""
    experts: tuple[StoredTensor, ...]
    expert_names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    seed: StoredTensor | None = None
    seed_name: str | None = None
    options: Any = None
    statistics: tuple[StoredTensor | None, ...] = ()
    """What `expertctl stats` gathered on it for each expert, where the method asks for it."""
    is_vocabulary: bool = False
    """Its first axis is the vocabulary, which differs between the models."""
    values: NDArray[Any] | None = field(default=None, compare=False, repr=False)

    @property
    def num_numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return DTYPES[self.dtype][1] * self.num_numbers

    @cached_property
    def inputs(self) -> tuple[StoredTensor, ...]:
        """What has to be read for it, each stored tensor once."""
        taken = self.experts[:1] if self.action == "copy" else self.experts
        everything = (*taken, self.seed) if self.seed is not None and self.action == "merge" else taken
        return tuple(dict.fromkeys(everything))

    @property
    def bytes_to_read(self) -> int:
        return sum({one.entry: one.entry.num_bytes for one in self.inputs}.values())


@dataclass(frozen=True)
class ShardPlan:
    """One file of the output."""

    file: str
    tensors: tuple[TensorPlan, ...]

    @cached_property
    def layout(self) -> tuple[bytes, dict[str, tuple[int, int]]]:
        """The bytes before the first tensor, and where in the file each tensor begins and ends."""
        return header_of_file({one.name: (one.dtype, one.shape) for one in self.tensors})

    @property
    def num_bytes(self) -> int:
        return len(self.layout[0]) + sum(one.num_bytes for one in self.tensors)


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
        self.settings = _Settings(recipe, method)

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


class _Settings:
    """Resolves the method's options and the experts' weights for each tensor."""

    def __init__(self, recipe: Recipe, method: MergeMethod) -> None:
        self.recipe, self.method = recipe, method
        kind = method.options or NoOptions
        hints = typing.get_type_hints(kind)
        self.shared = {_user_name(one.name) for one in fields(kind) if hints[one.name] != PerExpert}
        self.per_expert = {_user_name(one.name) for one in fields(kind) if hints[one.name] == PerExpert}
        self._parsed: dict[tuple[tuple[str, Any], ...], Any] = {}
        self._check_keys()

    def laid_over(
        self,
        plan: TensorPlan,
        part: OutputSlice,
        experts: Sequence[SourceSlice],
        inputs: Mapping[str, str],
        depth: float,
        seed: StoredTensor | None,
    ) -> TensorPlan:
        """Return the plan with the method's options, the weights, and the seed where the method reads it."""
        below = (part.parameters, *self.recipe.scopes)
        values = {key: resolve(key, below, plan.name, depth) for key in self.shared}
        self._check_required(values, f"'{plan.name}'")
        for key in self.per_expert:
            each = [resolve(key, (one.parameters, *below), inputs[one.model], depth) for one in experts]
            values[key] = each[0] if len(set(each)) == 1 else self._completed(key, each)
        options = self._options({key: value for key, value in values.items() if value is not None})
        given = [resolve(WEIGHT, (one.parameters, *below), inputs[one.model], depth) for one in experts]
        uses = self.method.uses_seed
        needs_seed = uses(options) if callable(uses) else uses
        if needs_seed and seed is None:
            raise UserError(
                f"merge method '{self.method.name}' compares experts with the seed they started from, and this "
                "merge names none; give it as base_model"
            )
        for one, weight in zip(experts, given, strict=True):
            self._check_required({WEIGHT: weight}, f"'{inputs[one.model]}' of '{one.model}'")
        weights = self._weights(given, [one.model for one in experts], plan.name)
        # rows that experts lack may come from the seed
        origin = seed if needs_seed or plan.is_vocabulary else None
        return replace(plan, options=options, weights=weights, seed=origin)

    def _check_required(self, values: Mapping[str, Any], tensor: str) -> None:
        for key, value in values.items():
            if value is None and key in self.recipe.required:
                raise UserError(
                    f"merge method '{self.method.name}' needs the parameter '{key}', and none is given for tensor "
                    f"{tensor}"
                )

    def _completed(self, key: str, each: Sequence[Any]) -> tuple[Any, ...]:
        """Return one value for each expert, the method's default where none is given."""
        kind = self.method.options or NoOptions
        default = next(getattr(kind(), one.name) for one in fields(kind) if _user_name(one.name) == key)
        return tuple(default if value is None else value for value in each)

    def _options(self, values: Mapping[str, Any]) -> Any:
        key = tuple(sorted(values.items()))
        if key not in self._parsed:
            what = f"merge method '{self.method.name}'"
            self._parsed[key] = parse_options(self.method.options, values, what)
        return self._parsed[key]

    def _weights(self, given: Sequence[Any], experts: Sequence[str], tensor: str) -> tuple[float, ...]:
        for name, weight in zip(experts, given, strict=True):
            if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float)):
                raise UserError(f"the weight of '{name}' is {weight!r}, which is no number")
        if self.method.weights == "factors":
            return tuple(1.0 if weight is None else float(weight) for weight in given)
        if all(weight is None for weight in given):
            return (1 / len(experts),) * len(experts)
        missing = [name for name, weight in zip(experts, given, strict=True) if weight is None]
        if missing:
            raise UserError(
                f"no weight is given for {', '.join(missing)}; name every expert, or leave it out of the merge"
            )
        for name, weight in zip(experts, given, strict=True):
            if weight < 0:
                raise UserError(
                    f"the weight of '{name}' is {weight}; weights of '{self.method.name}' are 0 or more"
                )
        total = math.fsum(given)
        if not total > 0:
            raise UserError(f"the weights of '{tensor}' sum to {total}; give at least one that is positive")
        return tuple(weight / total for weight in given)

    def _check_keys(self) -> None:
        """Raise `UserError` for a parameter that the method does not have."""
        known = {WEIGHT, *self.shared, *self.per_expert}
        for scope, is_source in self._scopes():
            for key in scope:
                if key not in known:
                    raise unknown_option(f"merge method '{self.method.name}'", key, known - {WEIGHT})
                if is_source and key in self.shared:
                    raise UserError(
                        f"option '{key}' of merge method '{self.method.name}' is one for all experts; give it for "
                        "the merge, not for one of them"
                    )

    def _scopes(self) -> Iterable[tuple[Scope, bool]]:
        for scope in self.recipe.scopes:
            yield scope, False
        for part in self.recipe.slices:
            yield part.parameters, False
            for one in part.sources:
                yield one.parameters, True


def _user_name(field: str) -> str:
    return field.rstrip("_")


def plan_shards(tensors: Sequence[TensorPlan], shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[ShardPlan]:
    """Return the files that the tensors go into, named as transformers does; none is larger than `shard_bytes`
    unless a single tensor is.

    Within a file wider numbers come first, so that every tensor is aligned whatever dtypes are mixed.
    """
    groups: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    ordered = [tuple(sorted(group, key=lambda one: -DTYPES[one.dtype][1])) for group in groups]
    if len(ordered) == 1:
        return [ShardPlan(SINGLE_FILE, ordered[0])]
    return [
        ShardPlan(f"model-{number:05}-of-{len(ordered):05}.safetensors", group)
        for number, group in enumerate(ordered, start=1)
    ]


def index_of(shards: Sequence[ShardPlan]) -> dict[str, Any]:
    """Return the content of the index file that goes with several shards."""
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    return {
        "metadata": {
            "total_parameters": sum(one.num_numbers for one in tensors),
            "total_size": sum(one.num_bytes for one in tensors),
        },
        "weight_map": {one.name: shard.file for shard in shards for one in shard.tensors},
    }
