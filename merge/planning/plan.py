"""The plan of a merge: everything that can be refused is refused here, before a tensor is read."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.lineage import Manifest, digest_of_tokenizer, package_version
from ...core.artefacts.numeric import FLOATING
from ...core.errors import UserError
from ...core.hooks.manager import installed_plugins
from ...core.hooks.merging import MergeMethod, TensorGroup
from ...core.hooks.options import parse_options
from ...core.hooks.text import ValidationText
from ...core.process.compute import available_cores
from ..engine.calculator import BESIDE_BYTES, MOST_THREADS, Calculator, EngineSettings
from ..engine.reading import Reader
from ..engine.shards import DEFAULT_SHARD_BYTES, ShardPlan, plan_shards
from ..recipes.recipe import WEIGHT, Recipe
from ..sources.licences import LicenceReport, check_licences, licence_of_folder, require_compatible
from ..sources.models import Source, StoredTensor, open_source
from ..sources.relatedness import require_related
from ..sources.tensor_names import embedding_name, head_name
from ..sources.tokenizers import ModelVocabulary, VocabularyPlan, plan_vocabulary
from .tensor_planner import Stack, plan_tensors

if TYPE_CHECKING:
    from .assembly import Assembly

BASE_BYTES = 64 << 20
"""What Python and numpy take by themselves."""
TORCH_BYTES = 300 << 20
READ_BYTES_PER_SECOND = 1.5e9
WRITE_BYTES_PER_SECOND = 0.7e9
_SAMPLE = (256, 256)
_TORCH_SECONDS_PER_NUMBER = 2e-9


@dataclass(frozen=True)
class Permissions:
    """What the user insists on though it looks wrong."""

    unrelated: bool = False
    """Merge models that do not descend from one another."""
    licences: bool = False
    """Merge models whose licences contradict each other."""


@dataclass(frozen=True)
class MergePlan:
    """One merge, checked: which tensors from where, and what it will cost."""

    recipe: Recipe
    method: MergeMethod
    sources: Mapping[str, Source]
    stack: Stack
    shards: tuple[ShardPlan, ...]
    shard_bytes: int
    vocabulary: VocabularyPlan | None
    licence: str | None
    notes: tuple[str, ...]
    """What a user should know though nothing is refused."""
    settings: EngineSettings = field(default_factory=EngineSettings)
    assembly: Assembly | None = None
    """Where the result is of another class than its inputs: its configuration, and what its manifest says of it."""

    @property
    def tensor_method(self) -> MergeMethod:
        """What merges single tensors: the method, or the mean where a method assembles a model."""
        return self.method if self.method.merge is not None else installed_plugins().merge_method("average")

    @property
    def leading(self) -> Source:
        """The model whose configuration and tokenizer the output takes: the seed, else the first."""
        return self.sources[self.recipe.seed or self.recipe.slices[0].sources[0].model]

    @property
    def experts(self) -> tuple[str, ...]:
        return self.recipe.experts

    @property
    def bytes_to_read(self) -> int:
        return sum(one.bytes_to_read for one in self.stack.tensors)

    @property
    def bytes_to_write(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def threads(self) -> int:
        return self.settings.threads or min(available_cores(), MOST_THREADS)

    @property
    def peak_bytes(self) -> int:
        """About how much memory the merge takes at most; it does not depend on how many layers there are."""
        with Reader() as reader:
            calculator = Calculator(self.tensor_method, reader, self.vocabulary)
            needs = [calculator.bytes_needed(one) for one in self.stack.tensors]
        base = (
            BASE_BYTES
            if self.tensor_method.arrays == "any" and self.settings.device == "cpu"
            else TORCH_BYTES
        )
        beside = min(sum(sorted(needs)[:-1][-self.threads + 1 :]), BESIDE_BYTES) if self.threads > 1 else 0
        return base + max(needs, default=0) + beside

    def seconds(self) -> float:
        """Return about how long the merge takes: the method is timed on a small sample, the disk is guessed."""
        merged = sum(
            one.num_numbers * len(one.experts) for one in self.stack.tensors if one.action == "merge"
        )
        calculating = merged * _seconds_per_number(self) + _seconds_of_hashing(
            self.bytes_to_read + self.bytes_to_write
        )
        reading = self.bytes_to_read / READ_BYTES_PER_SECOND
        return (calculating + reading) / self.threads + self.bytes_to_write / WRITE_BYTES_PER_SECOND

    def weights(self) -> dict[str, float]:
        """Return how much each expert counts, on average over the tensors that the method merges."""
        totals = dict.fromkeys(self.experts, 0.0)
        count = 0
        for one in self.stack.tensors:
            if one.action == "merge":
                count += 1
                for name, weight in zip(one.expert_names, one.weights, strict=True):
                    totals[name] += weight
        if not count:
            return {name: 1 / len(totals) for name in totals}
        return {name: total / count for name, total in totals.items()}

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the bytes of the result: what a resumed merge must share."""
        return {
            "method": self.method.name,
            "tensors": [
                [
                    one.name,
                    one.action,
                    one.dtype,
                    list(one.weights),
                    asdict(one.options) if one.options is not None else None,
                    [[str(stored.entry.file), stored.entry.begin, stored.name] for stored in one.inputs],
                    [stored is not None for stored in one.statistics],
                    hashlib.sha256(one.values.tobytes()).hexdigest() if one.values is not None else None,
                ]
                for one in self.stack.tensors
            ],
            "files": sorted(
                {
                    (str(file), file.stat().st_size, file.stat().st_mtime_ns)
                    for one in self.stack.tensors
                    for file in {stored.entry.file for stored in one.inputs}
                }
            ),
            "adapters": {
                name: source.adapter.digest() for name, source in self.sources.items() if source.adapter
            },
            "vocabulary": repr(self.vocabulary),
            "round_to": self.recipe.input_dtype,
            "shards": [[shard.file, shard.num_bytes] for shard in self.shards],
            "versions": {name: package_version(name) for name in ("expertctl", "numpy")},
        }


def prepare_merge(
    recipe: Recipe,
    *,
    permissions: Permissions | None = None,
    settings: EngineSettings | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    statistics: Mapping[str, Mapping[str, StoredTensor]] | None = None,
    validation: Callable[[], Sequence[ValidationText]] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> MergePlan:
    """Open all models by their headers, check that they fit, and return what the merge will do.

    No tensor is read (a few kilobytes of some are, to see whether models are related), unless `validation` is given:
    then a mixture's router is fitted, where that takes a model. Raises `UserError` that names key, file or tensor and shows both sides.
    """
    allowed = permissions or Permissions()
    _check_device((settings or EngineSettings()).device)
    method = installed_plugins().merge_method(recipe.method)
    if method.build is not None:
        raise UserError(
            f"merge method '{method.name}' makes a model of its own kind, not one merged tensor by tensor"
        )
    sources = open_sources(recipe)
    vocabulary = _vocabulary(recipe, sources)
    rows = vocabulary.size if vocabulary else None
    if not allowed.unrelated:
        _require_relation(recipe, sources)
    report = licence_report(sources)
    require_compatible(report, allowed.licences)
    assembly: Assembly | None = None
    if method.assemble is not None:
        assembly = _assembled(recipe, method, sources, rows, validation, say)
        leading = recipe.seed or recipe.slices[0].sources[0].model
        layers = tuple((leading, layer) for layer in range(sources[leading].num_layers))
        stack = Stack(assembly.tensors, layers)
    else:
        stack = plan_tensors(recipe, method, sources, rows, statistics)
    if not any(one.dtype in FLOATING for one in stack.tensors):
        raise UserError("there is no tensor of floating-point numbers to merge")
    return MergePlan(
        recipe,
        method,
        sources,
        stack,
        tuple(plan_shards(stack.tensors, shard_bytes)),
        shard_bytes,
        vocabulary,
        report.result if not report.conflicts else None,
        (
            *report.conflicts,
            *report.notes,
            *(vocabulary.notes if vocabulary else ()),
            *(assembly.notes if assembly else ()),
        ),
        settings or EngineSettings(),
        assembly,
    )


def _assembled(
    recipe: Recipe,
    method: MergeMethod,
    sources: Mapping[str, Source],
    vocabulary_rows: int | None,
    validation: Callable[[], Sequence[ValidationText]] | None,
    say: Callable[[str], None],
) -> Assembly:
    """Let a method plan a model of another class."""
    from .assembly_inputs import AssemblyInputs

    given = {key: value for scope in reversed(recipe.scopes) for key, value in scope.items()}
    options = parse_options(method.options, given, f"merge method '{method.name}'")
    own = {
        source.model: {key: value for key, value in source.parameters.items() if key != WEIGHT}
        for part in recipe.slices
        for source in part.sources
    }
    mean = installed_plugins().merge_method("average")
    inputs = AssemblyInputs(
        recipe,
        sources,
        lambda dense: plan_tensors(dense, mean, sources, vocabulary_rows).tensors,
        own,
        validation,
        say,
    )
    assert method.assemble is not None
    assembly: Assembly = method.assemble(inputs, options)
    return assembly


def _check_device(device: str) -> None:
    """Raise `UserError` for a device that is not there; for the CPU nothing has to be imported."""
    if device == "cpu":
        return
    import torch

    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise UserError(
            f"there is no device '{device}'; merges calculate on cpu, cuda, or one of several: cuda:1"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise UserError(
            f"there is no device '{device}': this machine has {count} GPUs that torch can use; use --device cpu"
        )


def open_sources(recipe: Recipe) -> dict[str, Source]:
    """Open every model of a recipe: the seed first, since experts and adapters stand on it."""
    found: dict[str, Source] = {}
    if recipe.seed is not None:
        found[recipe.seed] = open_source(recipe.seed, recipe.models[recipe.seed])
    for name, folder in recipe.models.items():
        if name not in found:
            base = found.get(recipe.seed) if recipe.seed is not None else None
            if name in recipe.adapter_bases:
                base = open_source(f"base of {name}", recipe.adapter_bases[name])
            found[name] = open_source(name, folder, base)
    return found


def check_output(plan: MergePlan, output: Path) -> None:
    """Raise `UserError` when the output cannot be written: no permission, or too little disk."""
    parent = output
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{output} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{output} cannot be made: {parent} may not be written")
    free = shutil.disk_usage(parent).free
    if free < plan.bytes_to_write:
        raise UserError(
            f"{output} needs {plan.bytes_to_write / 1e9:,.2f} GB, and its disk has {free / 1e9:,.2f} GB left; free "
            "some, or choose another place"
        )


def licence_report(sources: Mapping[str, Source]) -> LicenceReport:
    """Return how the licences of all models go together."""
    return check_licences({name: licence_of_folder(source.folder) for name, source in sources.items()})


def _require_relation(recipe: Recipe, sources: Mapping[str, Source]) -> None:
    """Refuse models that do not descend from one seed: by their manifests where they have them, else by likeness."""
    first = recipe.seed or recipe.slices[0].sources[0].model
    origin = sources[first]
    others = {}
    for name, source in sources.items():
        if name == first or source.adapter is not None or source.model_folder == origin.model_folder:
            continue
        ours, theirs = _seed_digest(origin), _seed_digest(source)
        if source.kind == "expert" and theirs is not None and ours is not None and theirs != ours:
            raise UserError(
                f"expert '{name}' was branched from seed {theirs[:12]}, but '{first}' is of seed {ours[:12]}; "
                "experts of different seeds cannot be merged (insist with --allow-unrelated)"
            )
        others[name] = source
    require_related(
        (first, {name: one.entry for name, one in origin.tensors.items()}),
        {
            name: {tensor: one.entry for tensor, one in source.tensors.items()}
            for name, source in others.items()
        },
    )


def _seed_digest(source: Source) -> str | None:
    """Return the digest of the seed that a model is or comes from, None where nothing says so."""
    if source.manifest is None:
        return None
    if source.manifest.kind == "seed":
        return source.manifest.digest
    return next((one.digest for one in source.manifest.parents if one.kind == "seed"), None)


def _vocabulary(recipe: Recipe, sources: Mapping[str, Source]) -> VocabularyPlan | None:
    """Return how the models' vocabularies become one; None where they are one already."""
    leading = recipe.seed or recipe.slices[0].sources[0].model
    own = sources[leading]
    others = {
        name: source
        for name, source in sources.items()
        if name != leading and source.model_folder != own.model_folder
    }
    if (
        not recipe.tokens
        and recipe.pad_to_multiple_of is None
        and all(
            digest_of_tokenizer(source.model_folder) == digest_of_tokenizer(own.model_folder)
            and _rows(source) == _rows(own)
            for source in others.values()
        )
    ):
        return None
    return plan_vocabulary(
        _vocabulary_of(own),
        {name: _vocabulary_of(source) for name, source in others.items()},
        recipe.tokenizer,
        recipe.tokens,
        recipe.pad_to_multiple_of,
    )


def _vocabulary_of(source: Source) -> ModelVocabulary:
    return ModelVocabulary(source.name, source.model_folder, _rows(source))


def _rows(source: Source) -> int:
    """Return how many rows a model's token embedding has."""
    name = embedding_name(source.tensors) or head_name(source.tensors)
    if name is None:
        return int(source.config.get("vocab_size", 0))
    return source.tensors[name].shape[0]


def _seconds_per_number(plan: MergePlan) -> float:
    """Time the method on a small sample: seconds per number and expert."""
    example = next((one for one in plan.stack.tensors if one.action == "merge"), None)
    if example is None:
        return 0.0
    method = plan.tensor_method
    if method.arrays != "any" or plan.settings.device != "cpu" or method.statistics is not None:
        return _TORCH_SECONDS_PER_NUMBER
    import numpy as np

    source = np.random.default_rng(0)
    arrays: list[Any] = [
        source.standard_normal(_SAMPLE, dtype="float32") for _ in range(len(example.experts) + 1)
    ]
    group = TensorGroup(
        example.name,
        tuple(arrays[1:]),
        example.expert_names,
        example.weights,
        arrays[0] if example.seed is not None else None,
    )
    assert method.merge is not None
    method.merge(group, example.options)  # what is imported on the first call takes no part
    begin = time.perf_counter()
    method.merge(group, example.options)
    return (time.perf_counter() - begin) / (math.prod(_SAMPLE) * len(example.experts))


def _seconds_of_hashing(num_bytes: int) -> float:
    import hashlib

    sample = bytes(1 << 20)
    begin = time.perf_counter()
    hashlib.sha256(sample).digest()
    return (time.perf_counter() - begin) / len(sample) * num_bytes


def manifests_of(plan: MergePlan) -> dict[str, Manifest]:
    """Return the manifests of the models that have one."""
    return {name: source.manifest for name, source in plan.sources.items() if source.manifest is not None}
