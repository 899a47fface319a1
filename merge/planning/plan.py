"""The plan of a merge; all checks run here, before any tensor is read."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.artefacts.model_config import LAYER_KEYS, text_config
from ...core.artefacts.numeric import FLOATING
from ...core.artefacts.versions import package_version
from ...core.errors import UserError
from ...core.hooks.manager import installed_plugins
from ...core.hooks.merging import Assembler, MergeMethod, ModelBuilder, TensorGroup, TensorMerge
from ...core.hooks.options import parse_options
from ...core.hooks.text import ValidationText
from ...core.process.workers import require_cores
from ...core.reporting import SILENT, Reporter
from ..engine.actions import bytes_needed
from ..engine.calculator import EngineSettings
from ..engine.queueing import CONCURRENT_BYTES
from ..engine.shards import DEFAULT_SHARD_BYTES, ShardPlan, plan_shards
from ..engine.surveying import begin_survey, survey_group
from ..recipes.recipe import Recipe
from ..sources.configurations import compare_configurations
from ..sources.licences import check_licences, require_compatible
from ..sources.models import Source, open_sources
from ..sources.relatedness import require_related
from ..sources.statistics import Statistics, find_statistics
from ..sources.tensor_names import embedding_name, head_name, layer_names
from ..sources.vocabularies.model_vocabulary import ModelVocabulary
from ..sources.vocabularies.planning import plan_vocabulary
from ..sources.vocabularies.row_mapping import VocabularyPlan
from .assembly import Assembly, AssemblyInputs
from .tensor_planner import Stack, plan_tensors

BASE_BYTES = 64 << 20
"""Memory of Python and numpy without data."""
TORCH_BYTES = 300 << 20
READ_BYTES_PER_SECOND = 1.5e9
WRITE_BYTES_PER_SECOND = 0.7e9
_PASSES_OF_SURVEYS = 3
"""How often a merge with a survey of all tensors reads them, about."""
_SAMPLE_SHAPE = (256, 256)
_TORCH_SECONDS_PER_NUMBER = 2e-9


@dataclass(frozen=True)
class MergeRun:
    """Runtime settings and safety overrides of a merge; only `shard_bytes` affects the output files."""

    force: bool = False
    resume: bool = False
    allow_unrelated: bool = False
    """Merge models that do not descend from the same seed."""
    allow_licences: bool = False
    """Merge models with incompatible licences."""
    settings: EngineSettings = field(default_factory=EngineSettings)
    shard_bytes: int = DEFAULT_SHARD_BYTES
    reporter: Reporter = SILENT
    is_repetition: bool = False
    """The output is compared with an earlier merge and deleted; plugins are not told about it."""


@dataclass(frozen=True)
class MergePlan:
    """One checked merge: source of every tensor, output files and estimated cost."""

    recipe: Recipe
    method: MergeMethod
    sources: Mapping[str, Source]
    stack: Stack
    shard_bytes: int
    licence: str | None
    notes: tuple[str, ...]
    """Warnings for the user."""
    vocabulary: VocabularyPlan | None = None
    """None: all models have the same vocabulary."""
    statistics: Statistics = field(default_factory=dict)
    settings: EngineSettings = field(default_factory=EngineSettings)
    assembly: Assembly | None = None
    """Plan of a new model class (mixtures); None: the result has the class of its inputs."""

    @property
    def tensor_method(self) -> TensorMerge:
        """The method for single tensors: the merge method itself, or `average` for methods that assemble a model."""
        method = (
            self.method if isinstance(self.method, TensorMerge) else installed_plugins().offer(MergeMethod, "average")
        )
        assert isinstance(method, TensorMerge)
        return method

    @property
    def leading(self) -> Source:
        """The model that provides configuration and tokenizer: the seed, or the first model without a seed."""
        return self.sources[self.recipe.leading]

    @property
    def experts(self) -> tuple[str, ...]:
        return self.recipe.experts

    @cached_property
    def has_other_layers(self) -> bool:
        """Whether the output has other layers than the leading model: a selection, or layers of several models."""
        count = len(layer_names(self.leading.tensors).layers)
        is_whole = [layer for _, layer in self.stack.layers] == list(range(count))
        return self.assembly is None and not (is_whole and len({model for model, _ in self.stack.layers}) <= 1)

    @cached_property
    def shards(self) -> tuple[ShardPlan, ...]:
        """The output files."""
        return tuple(plan_shards(self.stack.tensors, self.shard_bytes)) if self.stack.tensors else ()

    @property
    def bytes_to_read(self) -> int:
        return sum(tensor.bytes_to_read for tensor in self.stack.tensors)

    @property
    def bytes_to_write(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def peak_bytes(self) -> int:
        """Estimated peak memory in bytes; independent of the number of layers."""
        method, threads = self.tensor_method, self.settings.num_tensors
        needs = sorted(bytes_needed(tensor, method) for tensor in self.stack.tensors)
        base = BASE_BYTES if method.arrays == "any" and self.settings.device == "cpu" else TORCH_BYTES
        base *= 1 + self.settings.workers if self.settings.workers > 1 else 1
        concurrent = min(sum(needs[:-1][-threads + 1 :]), CONCURRENT_BYTES) if threads > 1 else 0
        return base + max(needs, default=0) + concurrent

    def seconds(self) -> float:
        """Return the estimated duration in seconds, from a timed sample of the method and assumed disk speeds."""
        sample = bytes(1 << 20)
        hashing = _seconds(lambda: hashlib.sha256(sample).digest()) / len(sample)
        merged = sum(
            tensor.num_numbers * len(tensor.experts) for tensor in self.stack.tensors if tensor.action == "merge"
        )
        calculating = merged * _seconds_per_number(self) + hashing * (self.bytes_to_read + self.bytes_to_write)
        passes = 1 if begin_survey(self.tensor_method, self.stack.tensors) is None else _PASSES_OF_SURVEYS
        reading = passes * self.bytes_to_read / READ_BYTES_PER_SECOND
        return (calculating + reading) / self.settings.num_tensors + self.bytes_to_write / WRITE_BYTES_PER_SECOND

    def weights(self) -> dict[str, float]:
        """Return each expert's mean weight over the tensors that the method merges."""
        totals = dict.fromkeys(self.experts, 0.0)
        merged = [tensor for tensor in self.stack.tensors if tensor.action == "merge"]
        if not merged:
            return {name: 1 / len(totals) for name in totals}
        for tensor in merged:
            for name, weight in zip(tensor.expert_names, tensor.weights, strict=True):
                totals[name] += weight
        return {name: total / len(merged) for name, total in totals.items()}

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the output bytes; a resumed merge must have the same identity."""
        inputs = [stored for tensor in self.stack.tensors for stored in tensor.inputs]
        files = {stored.entry.file for stored in inputs}
        files |= {stored.scales.entry.file for stored in inputs if stored.scales is not None}
        return {
            "method": self.method.name,
            "tensors": [
                [
                    tensor.name,
                    tensor.action,
                    tensor.dtype,
                    list(tensor.weights),
                    asdict(tensor.options) if tensor.options is not None else None,
                    [
                        [str(stored.entry.file), stored.entry.begin, stored.name, repr(stored.perturbation)]
                        for stored in tensor.inputs
                    ],
                    [stored is not None for stored in tensor.statistics],
                    hashlib.sha256(tensor.values.tobytes()).hexdigest() if tensor.values is not None else None,
                ]
                for tensor in self.stack.tensors
            ],
            "files": sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files),
            "adapters": {name: source.adapter.digest for name, source in self.sources.items() if source.adapter},
            "vocabulary": repr(self.vocabulary),
            "round_to": self.recipe.input_dtype,
            "shards": [[shard.file, shard.num_bytes] for shard in self.shards],
            "versions": {name: package_version(name) for name in ("expertctl", "numpy")},
        }

    def with_recipe(
        self,
        recipe: Recipe,
        validation: Callable[[], Sequence[ValidationText]] | None = None,
        reporter: Reporter = SILENT,
        router_statistics: Mapping[str, Mapping[str, NDArray[Any]]] | None = None,
    ) -> MergePlan:
        """Return the plan of the same models with other weights, or with a router fitted on `validation`.

        `router_statistics` are those of experts of an earlier mixture, which then need no text.
        """
        rows = self.vocabulary.size if self.vocabulary is not None else None
        method = self.tensor_method
        if method is self.method:
            stack = plan_tensors(recipe, method, self.sources, rows, self.statistics)
            return replace(self, recipe=recipe, stack=stack)
        assert isinstance(self.method, Assembler)
        options = {key: value for scope in reversed(recipe.scopes) for key, value in scope.items()}
        inputs = AssemblyInputs(
            recipe,
            self.sources,
            lambda dense: plan_tensors(dense, method, self.sources, rows).tensors,
            validation,
            reporter,
            router_statistics or {},
        )
        assembly = self.method.assemble(
            inputs, parse_options(self.method.options_class(options), options, f"merge method '{self.method.name}'")
        )
        assert isinstance(assembly, Assembly), "assemblers return a plan of `plan_mixture`"
        layers = tuple((recipe.leading, layer) for layer in range(self.leading.num_layers))
        return replace(self, recipe=recipe, stack=Stack(assembly.tensors, layers), assembly=assembly)


def prepare_merge(
    recipe: Recipe,
    run: MergeRun | None = None,
    *,
    sources: Mapping[str, Source] | None = None,
    statistics: Statistics | None = None,
) -> MergePlan:
    """Check the compatibility of all models and return the plan of the merge.

    No tensor is read, except for a few kilobytes to check whether models are related. `sources` and `statistics` are
    opened here if they have not been. Raises `UserError` with the key, file or tensor and both values.
    """
    run = run or MergeRun()
    _check_device(run.settings.device)
    require_cores(run.settings.workers)
    method = installed_plugins().offer(MergeMethod, recipe.method)
    if isinstance(method, ModelBuilder):
        raise UserError(
            f"merge method '{method.name}' builds its own kind of model and does not merge tensor by tensor"
        )
    if sources is None:
        sources = open_sources(recipe.models, recipe.seed, recipe.adapter_bases)
    if statistics is None:
        statistics = find_statistics(method, recipe.experts, sources, None)
    vocabulary = _plan_vocabulary(recipe, sources)
    differences = _compare_configurations(recipe, sources, run.allow_unrelated)
    if not run.allow_unrelated:
        _require_related_models(recipe, sources)
    licences = check_licences({name: source.licence for name, source in sources.items()})
    require_compatible(licences, run.allow_licences)
    plan = MergePlan(
        recipe=recipe,
        method=method,
        sources=sources,
        stack=Stack((), ()),
        shard_bytes=run.shard_bytes,
        licence=licences.agreed,
        notes=(*recipe.notes, *licences.warnings, *differences, *(vocabulary.notes if vocabulary is not None else ())),
        vocabulary=vocabulary,
        statistics=statistics,
        settings=run.settings,
    ).with_recipe(recipe, reporter=run.reporter)
    if not any(tensor.dtype in FLOATING for tensor in plan.stack.tensors):
        raise UserError("the models have no floating-point tensors to merge")
    _check_layer_selection(plan)
    _check_dtypes(plan)
    return replace(plan, notes=(*plan.notes, *plan.assembly.notes)) if plan.assembly is not None else plan


def check_output(plan: MergePlan, output: Path) -> None:
    """Raise `UserError` if the output cannot be written: no permission or not enough disk space."""
    parent = output
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{output} cannot be created: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{output} cannot be created: {parent} is not writable")
    free = shutil.disk_usage(parent).free
    if free < plan.bytes_to_write:
        raise UserError(
            f"{output} needs {plan.bytes_to_write / 1e9:,.2f} GB, but its disk has only {free / 1e9:,.2f} GB left; free "
            "some space, or choose another folder"
        )


def _check_layer_selection(plan: MergePlan) -> None:
    """Raise `UserError` for a selection of layers that the configuration cannot express."""
    config = text_config(plan.leading.config)
    is_plain = any(key in config for key in LAYER_KEYS) and not config.get("is_encoder_decoder")
    if plan.has_other_layers and not is_plain:
        raise UserError(
            f"{plan.leading.model_folder / 'config.json'} does not contain the number of decoder layers, so layers of this "
            "architecture cannot be selected; merge whole models"
        )


def _check_dtypes(plan: MergePlan) -> None:
    """Raise `UserError` for an output in 8-bit floats, which no model computes with."""
    for tensor in plan.stack.tensors:
        if tensor.dtype.startswith("F8"):
            raise UserError(
                f"tensor '{tensor.name}' is {tensor.dtype}, and models in 8-bit floats cannot be loaded without their "
                "scales; choose the output dtype, for example --dtype bfloat16"
            )


def _check_device(device: str) -> None:
    """Raise `UserError` for an unavailable device; does not import torch for the CPU."""
    if device == "cpu":
        return
    import torch

    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise UserError(f"there is no device '{device}'; devices are cpu, cuda, and cuda:1 for the second GPU")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise UserError(f"there is no device '{device}': torch finds {count} GPUs on this machine; use --device cpu")


def _compare_configurations(recipe: Recipe, sources: Mapping[str, Source], allowed: bool) -> tuple[str, ...]:
    leading = sources[recipe.leading]
    others = {
        name: (source.model_folder, source.root.config)
        for name, source in sources.items()
        if source.model_folder != leading.model_folder
    }
    return compare_configurations((recipe.leading, leading.model_folder, leading.root.config), others, allowed)


def _require_related_models(recipe: Recipe, sources: Mapping[str, Source]) -> None:
    """Raise `UserError` for models of different seeds, by their manifests or by the similarity of their tensors."""
    first = recipe.leading
    origin = sources[first]
    others = {}
    for name, source in sources.items():
        if source.kind == "adapter" or source.model_folder == origin.model_folder:
            continue
        ours, theirs = origin.seed_digest, source.seed_digest
        if source.kind == "expert" and theirs is not None and ours is not None and theirs != ours:
            raise UserError(
                f"expert '{name}' was branched from seed {theirs[:12]}, but '{first}' has seed {ours[:12]}; "
                "experts of different seeds cannot be merged (override: --allow-unrelated)"
            )
        others[name] = {tensor: stored.entry for tensor, stored in source.tensors.items()}
    require_related((first, {name: stored.entry for name, stored in origin.tensors.items()}), others)


def _plan_vocabulary(recipe: Recipe, sources: Mapping[str, Source]) -> VocabularyPlan | None:
    """Return the plan of the merged vocabulary; None if all models have the same vocabulary."""
    base = sources[recipe.leading]
    named = {source.model for source in recipe.tokens.values()}
    others = [
        source
        for name, source in sources.items()
        if source is not base and (source.model_folder != base.model_folder or name in named)
    ]
    is_same = all(
        source.tokenizer == base.tokenizer and _embedding_rows(source) == _embedding_rows(base) for source in others
    )
    if is_same and not recipe.tokens and recipe.pad_to_multiple_of is None:
        return None
    first, *vocabularies = (
        ModelVocabulary(source.name, source.model_folder, _embedding_rows(source)) for source in (base, *others)
    )
    return plan_vocabulary(
        first,
        {vocabulary.name: vocabulary for vocabulary in vocabularies},
        recipe.tokenizer,
        recipe.tokens,
        recipe.pad_to_multiple_of,
    )


def _embedding_rows(source: Source) -> int:
    name = embedding_name(source.tensors) or head_name(source.tensors)
    if name is None:
        return int(text_config(source.config).get("vocab_size", 0))
    return source.tensors[name].shape[0]


def _seconds_per_number(plan: MergePlan) -> float:
    """Return the method's time in seconds per number and expert, measured on a small sample."""
    sample_tensor = next((tensor for tensor in plan.stack.tensors if tensor.action == "merge"), None)
    if sample_tensor is None:
        return 0.0
    method = plan.tensor_method
    if method.arrays != "any" or plan.settings.device != "cpu" or method.statistics is not None:
        return _TORCH_SECONDS_PER_NUMBER
    generator = np.random.default_rng(0)
    arrays: list[Any] = [
        generator.standard_normal(_SAMPLE_SHAPE, dtype="float32") for _ in range(len(sample_tensor.experts) + 1)
    ]
    group = TensorGroup(
        sample_tensor.name,
        tuple(arrays[1:]),
        sample_tensor.expert_names,
        sample_tensor.weights,
        arrays[0] if sample_tensor.seed is not None else None,
    )
    group = survey_group(method, group, sample_tensor.options)
    method.merge(group, sample_tensor.options)  # warm-up: the first call may import modules
    seconds = _seconds(lambda: method.merge(group, sample_tensor.options))
    return seconds / (math.prod(_SAMPLE_SHAPE) * len(sample_tensor.experts))


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
