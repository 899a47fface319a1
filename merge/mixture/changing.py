"""Add, remove and replace experts of a mixture without training.

Unchanged tensors are copied byte by byte from the mixture itself, so the original artefacts are not needed. A
mixture whose shared tensors are the mean of its experts has to be merged again, since the mean still contains
removed experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...core.artefacts.safetensors_io import Checkpoint
from ...core.errors import UserError, unknown_name
from ...core.hooks.merging import MergeMethod
from ...core.hooks.mixtures import MixtureShape, RouterRows
from ...core.manifests.generalist import AveragedExpert, ExpertChange, GeneralistConfig, MixtureRecord
from ...core.manifests.manifest import Manifest, Parent, read_manifest
from ...core.models.loading import WEIGHTS_FILE
from ..engine.shards import DEFAULT_SHARD_BYTES
from ..planning.assembly import Assembly, ExpertParts, plan_assembly
from ..planning.plan import MergePlan
from ..planning.tensor_planner import Stack
from ..recipes.recipe import Recipe, change_models, whole_models
from ..sources.licences import LicenceReport, check_licences, require_compatible
from ..sources.models import StoredTensor
from .mixing import PUBLIC, apply_bias, summarize_names
from .opened import OpenedMixture, open_mixture
from .options import MixtureOptions
from .routing.starts import ROUTER_FILE, read_router_start


@dataclass(frozen=True)
class Change:
    """Experts to remove, add and replace."""

    remove: tuple[str, ...] = ()
    add: Mapping[str, Path] = field(default_factory=dict)
    """Expert folders by name."""
    replace: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the replacements, by the name of the replaced expert, which the replacement keeps."""


@dataclass(frozen=True)
class ChangedMixture:
    """Plan and provenance of a changed mixture."""

    plan: MergePlan
    provenance: Manifest
    """Parents, configuration, data and licence."""


def plan_change(
    folder: Path, change: Change, *, when: datetime | None = None, allow_licences: bool = False
) -> ChangedMixture:
    """Plan a changed mixture without writing anything; raises `UserError` for an impossible change."""
    mixture = open_mixture(folder)
    _check(mixture, change)
    experts, router, joined = _changed_parts(mixture, change)
    options = MixtureOptions(**mixture.record.options)
    old = MixtureShape(
        len(mixture.experts), mixture.record.top_k, options.normalized, mixture.router.biases is not None
    )
    shape = replace(old, num_experts=len(experts), top_k=_top_k(mixture, len(experts)))
    tensors, config = _tensors(mixture, old, shape, experts, router)
    is_averaged = not shared_tensors_are_the_seeds(mixture.record)
    record = replace(mixture.record, top_k=shape.top_k, averaged=_averaged(mixture) if is_averaged else ())
    merged = replace(
        mixture.merged,
        experts=tuple(expert.name for expert in experts),
        mixture=record,
        history=(*mixture.merged.history, *history_entries(mixture.manifest, change, when)),
    )
    licences = _licences(mixture, change, joined)
    require_compatible(licences, allow_licences)
    notes = (*licences.conflicts, *licences.notes, *_traces(mixture, change))
    plan = MergePlan(
        recipe=_recipe(mixture, [expert.name for expert in experts if expert.name != PUBLIC]),
        method=_method(mixture),
        sources={mixture.manifest.name: mixture.source},
        stack=Stack(tensors, tuple((mixture.manifest.name, layer) for layer in range(len(router.rows)))),
        shard_bytes=mixture.merged.shard_bytes or DEFAULT_SHARD_BYTES,
        licence=licences.result if not licences.conflicts else None,
        notes=notes,
        assembly=Assembly(tensors, config, merged.experts, record, notes),
    )
    return ChangedMixture(plan, _provenance(mixture, change, joined, merged, licences))


# --- checks ---


def require_valid_change(change: Change) -> None:
    """Raise `UserError` for an empty change, and for an expert that is both removed and replaced."""
    if not (change.remove or change.add or change.replace):
        raise UserError("there is nothing to change; name an expert to remove, add or replace")
    duplicates = set(change.remove) & set(change.replace)
    if duplicates:
        raise UserError(
            f"cannot both remove and replace {', '.join(sorted(duplicates))}; name each expert in one of them"
        )


def _check(mixture: OpenedMixture, change: Change) -> None:
    require_valid_change(change)
    for name in (*change.remove, *change.replace):
        if name not in mixture.names:
            raise unknown_name("expert", name, mixture.names, listed_as="the mixture has")
        if name == PUBLIC:
            raise UserError(
                f"'{PUBLIC}' is the seed's feed-forward network, beside which the other experts were "
                "trained; it cannot be removed or replaced"
            )
    for name in change.add:
        if name in mixture.names:
            raise UserError(f"'{name}' is in the mixture already; use `expertctl expert replace`")
    if len(set(change.remove)) >= len(mixture.names):
        raise UserError("the change leaves no expert; keep at least one")


def shared_tensors_are_the_seeds(record: MixtureRecord) -> bool:
    """Return whether a mixture's shared tensors come from the seed rather than from its experts."""
    return record.options.get("shared") == "seed"


def _averaged(mixture: OpenedMixture) -> tuple[AveragedExpert, ...]:
    """Return the experts whose mean forms the shared tensors; removed experts stay part of that mean."""
    return mixture.record.averaged or tuple(
        AveragedExpert(parent.name, parent.digest, parent.weight, parent.licence)
        for parent in mixture.manifest.parents
        if parent.kind == "expert"
    )


def _top_k(mixture: OpenedMixture, count: int) -> int:
    """Return the top-k that a merge of `count` experts with the mixture's options would have."""
    top_k: Any = mixture.record.options.get("top_k")
    if top_k is None:
        top_k = getattr(_method(mixture).options, "usual_top_k", MixtureOptions.usual_top_k)
    return min(int(top_k), count)


def _method(mixture: OpenedMixture) -> Any:
    from ...core.hooks.manager import installed_plugins

    return installed_plugins().offer(MergeMethod, mixture.merged.method)


# --- experts and router rows ---


def _changed_parts(mixture: OpenedMixture, change: Change) -> tuple[list[ExpertParts], RouterRows, dict[str, Manifest]]:
    """Return experts and router rows after the change, and the manifests of the added experts."""
    import numpy as np

    names = mixture.names
    kept = [number for number, name in enumerate(names) if name not in change.remove]
    experts = [mixture.experts[number] for number in kept]
    rows = mixture.router.rows[:, kept].copy()
    biases = mixture.router.biases[:, kept].copy() if mixture.router.biases is not None else None
    joined: dict[str, Manifest] = {}
    for name, folder in {**change.replace, **change.add}.items():
        parts, row, manifest = _read_expert(mixture, name, folder)
        joined[name] = manifest
        if name in change.replace:
            index = [expert.name for expert in experts].index(name)
            experts[index] = parts
            if row is None:
                continue  # keeps the row of the replaced expert, which `_traces` reports
            rows[:, index] = row.rows[:, 0]
            if biases is not None and row.biases is not None:
                biases[:, index] = row.biases[:, 0]
        else:
            if row is None:
                reason = (
                    "has been trained since the merge" if mixture.merged.tunings else "is made of its experts' rows"
                )
                raise UserError(
                    f"expert '{name}' ({folder}) has no router row ({ROUTER_FILE}), and the mixture's "
                    f"router {reason}; train the expert with --trains flexolmo, or merge again with all "
                    "experts"
                )
            experts.append(parts)
            rows = np.concatenate([rows, row.rows], axis=1)
            if biases is not None and row.biases is not None:
                biases = np.concatenate([biases, row.biases], axis=1)
    return experts, RouterRows(rows, biases), joined


def _read_expert(mixture: OpenedMixture, name: str, folder: Path) -> tuple[ExpertParts, RouterRows | None, Manifest]:
    """Return an expert's feed-forward tensors, its router row if it has one, and its manifest.

    Raises `UserError` for an artefact that is not an expert of the mixture's seed.
    """
    manifest = read_manifest(folder)
    seed = next((parent.digest for parent in mixture.manifest.parents if parent.kind == "seed"), None)
    expert_seed = next((parent.digest for parent in manifest.parents if parent.kind == "seed"), None)
    if manifest.kind != "expert" or expert_seed != seed:
        raise UserError(
            f"'{name}' ({folder}) is {manifest.kind} of seed {str(expert_seed)[:12]}, and the mixture is of "
            f"seed {str(seed)[:12]}; train the expert from the mixture's seed"
        )
    entries = Checkpoint([folder / WEIGHTS_FILE]).entries
    dropped = _dropped(mixture, entries, manifest)
    options = mixture.record.options
    if dropped and options["shared"] == "seed" and not options["discard"]:
        raise UserError(
            f"expert '{name}' ({folder}) has its own {summarize_names(dropped)}, and this mixture takes all "
            "tensors outside the feed-forward networks from the seed; train it with --trains flexolmo or "
            "feed_forward, or merge again with --option discard=true"
        )
    public = next((expert.feed_forward for expert in mixture.experts if expert.name == PUBLIC), {})
    feed_forward = {}
    for tensor in mixture.experts[0].feed_forward:
        if tensor in entries:
            feed_forward[tensor] = StoredTensor(entries[tensor], manifest.tensors.get(tensor), name=tensor)
        elif tensor in public:
            feed_forward[tensor] = public[tensor]
        else:
            raise UserError(
                f"expert '{name}' ({folder}) has no tensor '{tensor}', and the mixture does not contain the "
                "seed's; merge again with all experts"
            )
    if not (folder / ROUTER_FILE).is_file():
        return ExpertParts(name, feed_forward), None, manifest
    bias = mixture.record.router.biases
    scale = float(options["router_options"].get("scale", 1.0))
    row = apply_bias(read_router_start(folder, name, scale), bias if bias != "none" else "drop")
    return ExpertParts(name, feed_forward), row, manifest


def _dropped(mixture: OpenedMixture, names: Collection[str], manifest: Manifest) -> list[str]:
    """Return an expert's tensors outside the FFNs that differ from the mixture's shared tensors."""
    feed_forward = mixture.experts[0].feed_forward
    shared = {name: plan.experts[0].expected for name, plan in mixture.shared.items()}
    return [name for name in names if name not in feed_forward and manifest.tensors.get(name) != shared.get(name)]


def _tensors(
    mixture: OpenedMixture, old: MixtureShape, shape: MixtureShape, experts: Sequence[ExpertParts], router: RouterRows
) -> tuple[Any, dict[str, Any]]:
    """Return the planned tensors and the mixture's configuration, updated for the new number of experts."""
    dense = mixture.record.dense
    tensors, config = plan_assembly(
        dense,
        mixture.family,
        mixture.target,
        shape,
        mixture.shared,
        experts,
        router,
        layout=mixture.record.options["layout"] if not mixture.merged.tunings else "per_expert",
    )
    before = mixture.target.config(dense, old)
    changed = {key: value for key, value in config.items() if before.get(key) != value}
    return tensors, {**mixture.source.config, **changed}


# --- manifest entry and notes ---


def _licences(mixture: OpenedMixture, change: Change, joined: Mapping[str, Manifest]) -> LicenceReport:
    """Check the licences of all experts in the changed mixture for compatibility."""
    removed = {*change.remove, *change.replace}
    kept = {parent.name: parent.licence for parent in mixture.manifest.parents if parent.name not in removed}
    averaged = [] if shared_tensors_are_the_seeds(mixture.record) else _averaged(mixture)
    return check_licences(
        {f"{expert.name} (in the mean)": expert.licence for expert in averaged if expert.name not in kept}
        | kept
        | {name: manifest.licence for name, manifest in joined.items()}
    )


def history_entries(manifest: Manifest, change: Change, when: datetime | None = None) -> list[ExpertChange]:
    """Return the manifest entries of a change: event, expert, date and digest of the model before."""
    date = (when or datetime.now(UTC)).date().isoformat()
    return [
        *(ExpertChange("left", name, date, manifest.digest) for name in change.remove),
        *(ExpertChange("replaced", name, date, manifest.digest) for name in change.replace),
        *(ExpertChange("joined", name, date, manifest.digest) for name in change.add),
    ]


def _traces(mixture: OpenedMixture, change: Change) -> list[str]:
    """Return notes about tensors that still depend on removed experts, and about tensors that are dropped."""
    removed = [*change.remove, *change.replace]
    traces = [
        f"trainer '{tuning.trains}' ran on {', '.join(tuning.domains)} while '{name}' was one of the "
        "experts, so the trained tensors depend on it"
        for tuning in mixture.merged.tunings
        for name in removed
        if name in tuning.experts
    ]
    if not shared_tensors_are_the_seeds(mixture.record):
        averaged = {expert.name for expert in _averaged(mixture)}
        traces += [
            f"the shared tensors stay a mean that includes '{name}'; a merge without it has another mean"
            for name in removed
            if name in averaged
        ]
    traces += [
        f"the replacement of '{name}' has no router row and keeps the row of '{name}'"
        for name, folder in change.replace.items()
        if not (folder / ROUTER_FILE).is_file()
    ]
    for name, folder in {**change.replace, **change.add}.items():
        dropped = _dropped(mixture, Checkpoint([folder / WEIGHTS_FILE]).entries, read_manifest(folder))
        if dropped:
            traces.append(f"{len(dropped)} tensors of '{name}' outside the feed-forward networks are dropped")
    if removed and mixture.record.router.uses_text:
        traces.append("the router's rows were fitted on text of all experts, including the removed ones")
    return traces


def _recipe(mixture: OpenedMixture, experts: Sequence[str]) -> Recipe:
    return Recipe(
        method=mixture.merged.method,
        models={mixture.manifest.name: mixture.source.folder},
        slices=whole_models(experts),
        seed=mixture.manifest.name,
    )


def _provenance(
    mixture: OpenedMixture,
    change: Change,
    joined: Mapping[str, Manifest],
    merged: GeneralistConfig,
    licences: LicenceReport,
) -> Manifest:
    manifest = mixture.manifest
    is_averaged = merged.mixture is not None and bool(merged.mixture.averaged)
    removed = {*change.remove, *change.replace}
    parents = [parent for parent in manifest.parents if parent.name not in removed]
    parents += [Parent.of(expert, name) for name, expert in joined.items()]
    weighted = [parent.name for parent in parents if parent.weight is not None or parent.name in joined]
    # the weights of an average stay, since no expert leaves the average
    weights = merged.weights if is_averaged else {name: 1 / len(weighted) for name in weighted}
    recipe = merged.recipe
    if recipe is not None:  # a recipe of several slices cannot be changed
        recipe = change_models(recipe, change.remove, change.add) if len(recipe["slices"]) == 1 else None
    parents = [
        replace(parent, weight=weights[parent.name])
        if parent.name in weights and not (is_averaged and parent.name in joined)
        else parent
        for parent in parents
    ]
    statements = {name: data for name, data in manifest.expert_data.items() if name not in removed}
    statements |= {name: expert.data for name, expert in joined.items()}
    return Manifest(
        kind="generalist",
        name=manifest.name,
        parents=tuple(parents),
        config=replace(merged, weights=weights, recipe=recipe),
        expert_data=statements,
        licence=licences.result if not licences.conflicts else None,
    )
