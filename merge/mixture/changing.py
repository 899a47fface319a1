"""Add, remove and replace experts of a mixture without training.

Unchanged tensors are copied byte by byte from the mixture itself, so the original artefacts are not needed. A mixture
whose shared tensors are the mean of its experts has to be merged again, since the mean still contains removed experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ...core.artefacts.safetensors_io import Checkpoint
from ...core.errors import UserError, unknown_name
from ...core.hooks.manager import installed_plugins
from ...core.hooks.merging import MergeMethod
from ...core.hooks.mixtures import RouterRows
from ...core.manifests.generalist import ExpertChange, GeneralistConfig
from ...core.manifests.manifest import Manifest, Parent, read_manifest
from ...core.manifests.statements import DataStatement
from ...core.models.adapters.folder import is_adapter
from ...core.models.loading import WEIGHTS_FILE
from ...core.reporting import SILENT, Reporter
from ..engine.shards import DEFAULT_SHARD_BYTES
from ..planning.assembly import Assembly, ExpertParts, plan_assembly
from ..planning.plan import MergePlan
from ..planning.tensor_planner import Stack
from ..planning.used_text import UsedText, Validation
from ..recipes.recipe import Recipe, change_models, whole_models
from ..sources.licences import check_licences, require_compatible
from ..sources.models import StoredTensor, open_source
from .mixing import PUBLIC, apply_bias, summarize_names
from .opened import OpenedMixture, open_mixture
from .options import MixtureOptions
from .refitting import fitted_domains, refit_router
from .routing.starts import ROUTER_FILE, read_router_start
from .routing.stored_statistics import has_statistics


@dataclass(frozen=True)
class Change:
    """Experts to remove, add and replace."""

    remove: tuple[str, ...] = ()
    add: Mapping[str, Path] = field(default_factory=dict)
    """Expert folders by name."""
    replace: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the replacements, by the name of the replaced expert, which the replacement keeps."""

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of the experts whose tensors leave the model."""
        return (*self.remove, *self.replace)

    @property
    def joining(self) -> dict[str, Path]:
        """Folders of the experts whose tensors join the model, by name."""
        return {**self.replace, **self.add}


@dataclass(frozen=True)
class _JoiningExpert:
    manifest: Manifest
    parts: ExpertParts
    row: RouterRows | None
    """Its router row, if it was trained with one."""
    dropped: Sequence[str]
    """Its tensors outside the FFNs that differ from the mixture's shared tensors."""


def plan_change(
    folder: Path,
    change: Change,
    *,
    allow_licences: bool = False,
    validation: Validation = tuple,
    reporter: Reporter = SILENT,
) -> tuple[MergePlan, Manifest]:
    """Return the plan of a changed mixture and a manifest of its provenance; raises `UserError` if it is impossible.

    `validation` returns the text of the joining experts' domains, for a router that is computed from text.
    """
    mixture = open_mixture(folder)
    _check(mixture, change)
    joining = {name: _open_expert(mixture, name, expert) for name, expert in change.joining.items()}
    experts = _changed_experts(mixture, change, joining)
    text = UsedText(validation)
    if has_statistics(mixture.manifest):
        manifests = {name: expert.manifest for name, expert in joining.items()}
        start = refit_router(mixture, experts, manifests, text, reporter)
        bias = mixture.record.router.biases
        router = apply_bias(start, bias if bias != "none" else "drop")
    else:
        start = router = _changed_rows(mixture, change, joining)
    method = installed_plugins().offer(MergeMethod, mixture.merged.method)
    options = mixture.options
    top_k = options.top_k  # that a merge of these experts with the mixture's options would have
    if top_k is None:
        top_k = getattr(method.options, "usual_top_k", MixtureOptions.usual_top_k)
    shape = replace(mixture.shape, num_experts=len(experts), top_k=min(top_k, len(experts)))
    tensors, config = plan_assembly(
        mixture.record.dense,
        mixture.family,
        mixture.target,
        shape,
        mixture.shared,
        experts,
        router,
        shared_expert=mixture.shared_expert,
        layout=options.layout if not mixture.merged.tunings else "per_expert",
    )
    before = mixture.target.config(mixture.record.dense, mixture.shape)
    config = {**mixture.source.config, **{key: value for key, value in config.items() if before.get(key) != value}}
    names = tuple(expert.name for expert in experts)
    record = replace(mixture.record, top_k=shape.top_k, averaged=mixture.averaged)
    fitted_on = mixture.merged.fitted_on
    if start.statistics:
        fitted_on = fitted_domains(mixture.manifest, change.removed, text.domains)
    merged = replace(mixture.merged, experts=names, mixture=record, fitted_on=fitted_on)
    provenance = _provenance(mixture, change, joining, merged)
    kept = {parent.name for parent in mixture.manifest.parents} - set(change.removed)
    licences = check_licences(
        {f"{expert.name} (in the mean)": expert.licence for expert in mixture.averaged if expert.name not in kept}
        | {parent.name: parent.licence for parent in provenance.parents}
    )
    require_compatible(licences, allow_licences)
    licence = licences.agreed
    notes = (*licences.warnings, *_traces(mixture, change, joining))
    plan = MergePlan(
        recipe=Recipe(
            method=method.name,
            models={mixture.manifest.name: folder},
            slices=whole_models([name for name in names if name != PUBLIC]),
            seed=mixture.manifest.name,
        ),
        method=method,
        sources={mixture.manifest.name: mixture.source},
        stack=Stack(tensors, tuple((mixture.manifest.name, layer) for layer in range(len(router.rows)))),
        shard_bytes=mixture.merged.shard_bytes or DEFAULT_SHARD_BYTES,
        licence=licence,
        notes=notes,
        assembly=Assembly(tensors, config, names, record, notes, router_statistics=start.statistics),
    )
    return plan, replace(provenance, licence=licence)


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


def require_known_names(names: Sequence[str], change: Change, model: str) -> None:
    """Raise `UserError` unless removed experts are in the `model` (a word for messages) and added ones are not."""
    for name in change.removed:
        if name not in names:
            raise unknown_name("expert", name, names, listed_as=f"the {model} has")
    for name in change.add:
        if name in names:
            raise UserError(f"'{name}' is in the {model} already; use `expertctl expert replace`")


def _check(mixture: OpenedMixture, change: Change) -> None:
    require_valid_change(change)
    require_known_names(mixture.names, change, "mixture")
    if PUBLIC in change.removed:
        raise UserError(
            f"'{PUBLIC}' is the seed's feed-forward network, beside which the other experts were trained; it cannot be "
            "removed or replaced"
        )
    if len(set(change.remove)) >= len(mixture.names):
        raise UserError("the change leaves no expert; keep at least one")


# --- experts and router rows ---


def _changed_experts(
    mixture: OpenedMixture, change: Change, joining: Mapping[str, _JoiningExpert]
) -> list[ExpertParts]:
    """Return the experts of the changed mixture: those that stay or are replaced in their places, then the added ones."""
    kept = [expert for expert in mixture.experts if expert.name not in change.remove]
    experts = [joining[expert.name].parts if expert.name in change.replace else expert for expert in kept]
    return experts + [joining[name].parts for name in change.add]


def _changed_rows(mixture: OpenedMixture, change: Change, joining: Mapping[str, _JoiningExpert]) -> RouterRows:
    """Return the rows of the experts that stay, with those that joining experts were trained with."""
    kept = [number for number, name in enumerate(mixture.names) if name not in change.remove]
    rows = mixture.router.rows[:, kept].copy()
    biases = mixture.router.biases[:, kept].copy() if mixture.router.biases is not None else None
    for name, expert in joining.items():
        row = expert.row
        if name in change.replace:
            index = [mixture.names[number] for number in kept].index(name)
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
                    f"expert '{name}' ({change.add[name]}) has no router row ({ROUTER_FILE}), and the mixture's router "
                    f"{reason}; train the expert with --trains flexolmo, or merge again with all experts"
                )
            rows = np.concatenate([rows, row.rows], axis=1)
            if biases is not None and row.biases is not None:
                biases = np.concatenate([biases, row.biases], axis=1)
    return RouterRows(rows, biases)


def require_expert_of(seed: str | None, expert: str, manifest: Manifest, model: str) -> None:
    """Raise `UserError` unless an artefact is an expert of a seed; `expert` and `model` are words for the message."""
    expert_seed = next((parent.digest for parent in manifest.parents if parent.kind == "seed"), None)
    if manifest.kind != "expert" or expert_seed != seed:
        raise UserError(
            f"{expert} is {manifest.kind} of seed {str(expert_seed)[:12]}, and {model} seed {str(seed)[:12]}; train the "
            "expert from that seed"
        )


def _open_expert(mixture: OpenedMixture, name: str, folder: Path) -> _JoiningExpert:
    """Open an expert; raises `UserError` for an artefact that is not an expert of the mixture's seed."""
    manifest = read_manifest(folder)
    require_expert_of(mixture.source.seed_digest, f"'{name}' ({folder})", manifest, "the mixture is of")
    own = _own_tensors(name, folder, manifest)
    names = mixture.experts[0].feed_forward
    shared = {tensor: plan.experts[0].expected for tensor, plan in mixture.shared.items()}
    dropped = [
        tensor
        for tensor, stored in own.items()
        if tensor not in names and (stored.adapter is not None or stored.expected != shared.get(tensor))
    ]
    options = mixture.options
    if dropped and options.shared == "seed" and not options.discard:
        raise UserError(
            f"expert '{name}' ({folder}) has its own {summarize_names(dropped)}, and this mixture takes all tensors outside "
            "the feed-forward networks from the seed; train it with --trains flexolmo or feed_forward, or merge again with "
            "--option discard=true"
        )
    public = next((expert.feed_forward for expert in mixture.experts if expert.name == PUBLIC), {})
    feed_forward = {}
    for tensor in names:
        if tensor in own:
            feed_forward[tensor] = own[tensor]
        elif tensor in public:
            feed_forward[tensor] = public[tensor]
        else:
            raise UserError(
                f"expert '{name}' ({folder}) has no tensor '{tensor}', and the mixture does not contain the seed's; merge "
                "again with all experts"
            )
    row = None
    if (folder / ROUTER_FILE).is_file():
        bias = mixture.record.router.biases
        start = read_router_start(folder, name, float(options.router_options.get("scale", 1.0)))
        row = apply_bias(start, bias if bias != "none" else "drop")
    return _JoiningExpert(manifest, ExpertParts(name, feed_forward), row, dropped)


def _own_tensors(name: str, folder: Path, manifest: Manifest) -> Mapping[str, StoredTensor]:
    """Return the tensors that training an expert changed; needs the seed's files only for an adapter."""
    if is_adapter(folder):
        return open_source(name, folder).own
    entries = Checkpoint([folder / WEIGHTS_FILE]).entries
    return {tensor: StoredTensor(entry, manifest.tensors.get(tensor)) for tensor, entry in entries.items()}


# --- manifest entry and notes ---


def _provenance(
    mixture: OpenedMixture, change: Change, joining: Mapping[str, _JoiningExpert], merged: GeneralistConfig
) -> Manifest:
    """Return the manifest of the changed mixture without its licence; `merged` has its experts and mixture record."""
    manifests = {name: expert.manifest for name, expert in joining.items()}
    parents = changed_parents(mixture.manifest, change, manifests)
    weights = merged.weights
    if not mixture.averaged:  # else the weights stay, since no expert leaves the average
        weighted = [parent.name for parent in parents if parent.weight is not None or parent.name in joining]
        weights = dict.fromkeys(weighted, 1 / len(weighted))
        parents = [replace(parent, weight=weights.get(parent.name)) for parent in parents]
    recipe = merged.recipe
    if recipe is not None:  # a recipe of several slices cannot be changed
        recipe = change_models(recipe, change.remove, change.add) if len(recipe["slices"]) == 1 else None
    history = (*merged.history, *history_entries(mixture.manifest, change))
    return Manifest(
        kind="generalist",
        name=mixture.manifest.name,
        parents=tuple(parents),
        config=replace(merged, weights=weights, recipe=recipe, history=history),
        expert_data=changed_data(mixture.manifest, change, manifests),
    )


def changed_parents(manifest: Manifest, change: Change, joining: Mapping[str, Manifest]) -> list[Parent]:
    """Return the parents of a changed model: those that stay, and the added experts without weights."""
    kept = [parent for parent in manifest.parents if parent.name not in change.removed]
    return kept + [Parent.of(expert, name) for name, expert in joining.items()]


def changed_data(manifest: Manifest, change: Change, joining: Mapping[str, Manifest]) -> dict[str, DataStatement]:
    """Return the data statements of a changed model's experts."""
    kept = {name: data for name, data in manifest.expert_data.items() if name not in change.removed}
    return kept | {name: expert.data for name, expert in joining.items()}


def history_entries(manifest: Manifest, change: Change) -> list[ExpertChange]:
    """Return the manifest entries of a change: event, expert, date and digest of the model before."""
    date = datetime.now(UTC).date().isoformat()
    return [
        *(ExpertChange("left", name, date, manifest.digest) for name in change.remove),
        *(ExpertChange("replaced", name, date, manifest.digest) for name in change.replace),
        *(ExpertChange("joined", name, date, manifest.digest) for name in change.add),
    ]


def _traces(mixture: OpenedMixture, change: Change, joining: Mapping[str, _JoiningExpert]) -> list[str]:
    """Return notes about tensors that still depend on removed experts, and about tensors that are dropped."""
    traces = [
        f"trainer '{tuning.trains}' ran on {', '.join(tuning.domains)} while '{name}' was one of the "
        "experts, so the trained tensors depend on it"
        for tuning in mixture.merged.tunings
        for name in change.removed
        if name in tuning.experts
    ]
    averaged = {expert.name for expert in mixture.averaged}
    traces += [
        f"the shared tensors stay a mean that includes '{name}'; a merge without it has another mean"
        for name in change.removed
        if name in averaged
    ]
    traces += [
        f"the replacement of '{name}' has no router row and keeps the row of '{name}'"
        for name in change.replace
        if joining[name].row is None and not has_statistics(mixture.manifest)
    ]
    traces += [
        f"{len(expert.dropped)} tensors of '{name}' outside the feed-forward networks are dropped"
        for name, expert in joining.items()
        if expert.dropped
    ]
    if change.removed and mixture.record.router.uses_text and not has_statistics(mixture.manifest):
        traces.append("the router's rows were fitted on text of all experts, including the removed ones")
    return traces
