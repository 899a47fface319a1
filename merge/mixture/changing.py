"""Experts that join a mixture later, leave it, or take another's place, without any training.

What stays is copied byte by byte from the mixture itself, so that nobody else's files are needed. A mixture whose shared
part is the experts' mean is made again from its experts instead, since that mean must not hold the one who left.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...core.artefacts.lineage import Manifest, Parent, read_manifest
from ...core.artefacts.safetensors_io import Checkpoint
from ...core.errors import UserError, unknown_name
from ...core.hooks.mixtures import MixtureShape
from ...core.models.loading import WEIGHTS_FILE
from ..engine.shards import DEFAULT_SHARD_BYTES, plan_shards
from ..generalists.folder import Descent
from ..planning.assembly import Assembly, ExpertParts, RouterParts, plan_assembly
from ..planning.plan import MergePlan
from ..planning.tensor_planner import Stack
from ..recipes.recipe import Recipe, whole_models
from ..sources.licences import LicenceReport, check_licences, require_compatible
from ..sources.models import StoredTensor
from .mixing import PUBLIC, first_of, settle_bias
from .opened import OpenedMixture, open_mixture
from .options import MixtureOptions
from .routing.starts import ROUTER_FILE, brought_by


@dataclass(frozen=True)
class Change:
    """Who leaves, who joins, who takes whose place."""

    remove: tuple[str, ...] = ()
    add: Mapping[str, Path] = field(default_factory=dict)
    """Expert folders by name."""
    replace: Mapping[str, Path] = field(default_factory=dict)
    """For experts of the mixture, the folders of what takes their place, under the same name."""


@dataclass(frozen=True)
class ChangedMixture:
    """What a change would write."""

    plan: MergePlan
    descent: Descent


def plan_change(
    folder: Path, change: Change, *, when: datetime | None = None, allow_licences: bool = False
) -> ChangedMixture:
    """Return the plan of a changed mixture; raises `UserError` for what is not possible, before anything is written."""
    mixture = open_mixture(folder)
    _check(mixture, change)
    experts, router, joined = _changed_parts(mixture, change)
    options = MixtureOptions(**mixture.record["options"])
    old = MixtureShape(
        len(mixture.experts), mixture.record["top_k"], options.normalized, mixture.router.biases is not None
    )
    shape = replace(old, num_experts=len(experts), top_k=_top_k(mixture, len(experts)))
    tensors, config = _tensors(mixture, old, shape, experts, router)
    record = {
        **mixture.record,
        "experts": [expert.name for expert in experts],
        "top_k": shape.top_k,
        "history": [*mixture.record.get("history", ()), *history(mixture.manifest, change, when)],
    }
    if not shares_its_rest_with_the_seed(mixture.manifest):
        record["averaged"] = _averaged(mixture)
    licences = _licences(mixture, change, joined)
    require_compatible(licences, allow_licences)
    notes = (*licences.conflicts, *licences.notes, *_traces(mixture, change))
    plan = MergePlan(
        recipe=_recipe(mixture, [expert.name for expert in experts if expert.name != PUBLIC]),
        method=_method(mixture),
        sources={mixture.manifest.name: mixture.source},
        stack=Stack(tensors, tuple((mixture.manifest.name, layer) for layer in range(len(router.rows)))),
        shards=tuple(
            plan_shards(tensors, int(mixture.manifest.config.get("shard_bytes", DEFAULT_SHARD_BYTES)))
        ),
        shard_bytes=int(mixture.manifest.config.get("shard_bytes", DEFAULT_SHARD_BYTES)),
        vocabulary=None,
        licence=licences.result if not licences.conflicts else None,
        notes=notes,
        assembly=Assembly(tensors, config, tuple(record["experts"]), record, notes),
    )
    return ChangedMixture(plan, _descent(mixture, change, joined, record, licences))


# --- checks ---


def require_sense(change: Change) -> None:
    """Raise `UserError` for a change that changes nothing, or in which one expert leaves in two ways."""
    if not (change.remove or change.add or change.replace):
        raise UserError(
            "nothing is to be changed; name an expert that leaves, joins or takes another's place"
        )
    both = set(change.remove) & set(change.replace)
    if both:
        raise UserError(f"{', '.join(sorted(both))}: either leaves or is replaced, not both")


def _check(mixture: OpenedMixture, change: Change) -> None:
    require_sense(change)
    for name in (*change.remove, *change.replace):
        if name not in mixture.names:
            raise unknown_name("expert", name, mixture.names, listed_as="the mixture has")
        if name == PUBLIC:
            raise UserError(f"'{PUBLIC}' is the seed's own part, which every other expert was trained beside")
    for name in change.add:
        if name in mixture.names:
            raise UserError(f"'{name}' is in the mixture already; use `expertctl expert replace`")
    if len(set(change.remove)) >= len(mixture.names):
        raise UserError("no expert would be left")


def shares_its_rest_with_the_seed(manifest: Manifest) -> bool:
    """Tell whether a mixture's shared part holds nothing of its experts."""
    record = manifest.config.get("mixture") or {}
    return bool(record.get("options", {}).get("shared") == "seed")


def _averaged(mixture: OpenedMixture) -> list[dict[str, Any]]:
    """Return the experts whose mean is all that is no feed-forward: they stay in it, whoever leaves."""
    known: list[dict[str, Any]] | None = mixture.record.get("averaged")
    return known or [
        {"name": one.name, "digest": one.digest, "weight": one.weight, "licence": one.licence}
        for one in mixture.manifest.parents
        if one.kind == "expert"
    ]


def _top_k(mixture: OpenedMixture, count: int) -> int:
    """Return the top-k of a merge of so many experts with the mixture's options."""
    wanted = mixture.record["options"].get("top_k")
    usual = getattr(_method(mixture).options, "usual_top_k", MixtureOptions.usual_top_k)
    return min(int(wanted if wanted is not None else usual), count)


def _method(mixture: OpenedMixture) -> Any:
    from ...core.hooks.manager import installed_plugins

    return installed_plugins().merge_method(mixture.manifest.config["method"])


# --- the parts ---


def _changed_parts(
    mixture: OpenedMixture, change: Change
) -> tuple[list[ExpertParts], RouterParts, dict[str, Manifest]]:
    """Return experts and router rows after the change, and the manifests of those that joined."""
    import numpy as np

    names = mixture.names
    kept = [number for number, name in enumerate(names) if name not in change.remove]
    experts = [mixture.experts[number] for number in kept]
    rows = mixture.router.rows[:, kept].copy()
    biases = mixture.router.biases[:, kept].copy() if mixture.router.biases is not None else None
    joined: dict[str, Manifest] = {}
    for name, folder in {**change.replace, **change.add}.items():
        parts, row, manifest = _brought(mixture, name, folder)
        joined[name] = manifest
        if name in change.replace:
            place = [expert.name for expert in experts].index(name)
            experts[place] = parts
            if row is None:
                continue  # it is the predecessor's, which `_traces` tells
            rows[:, place] = row.rows[:, 0]
            if biases is not None and row.biases is not None:
                biases[:, place] = row.biases[:, 0]
        else:
            if row is None:
                why = (
                    "was trained since its merge"
                    if mixture.record.get("tuned")
                    else "is made of its experts' rows"
                )
                raise UserError(
                    f"'{name}' ({folder}) brings no router row ({ROUTER_FILE}), and this router {why}; "
                    "train the expert with --trains flexolmo, or merge again with all experts"
                )
            experts.append(parts)
            rows = np.concatenate([rows, row.rows], axis=1)
            if biases is not None and row.biases is not None:
                biases = np.concatenate([biases, row.biases], axis=1)
    return experts, RouterParts(rows, biases), joined


def _brought(
    mixture: OpenedMixture, name: str, folder: Path
) -> tuple[ExpertParts, RouterParts | None, Manifest]:
    """Return what an expert brings to this mixture, maybe a router row; raises `UserError` for one of another seed."""
    manifest = read_manifest(folder)
    seed = next((parent.digest for parent in mixture.manifest.parents if parent.kind == "seed"), None)
    theirs = next((parent.digest for parent in manifest.parents if parent.kind == "seed"), None)
    if manifest.kind != "expert" or theirs != seed:
        raise UserError(
            f"'{name}' ({folder}) is {manifest.kind} of seed {str(theirs)[:12]}, and the mixture is of seed {str(seed)[:12]}"
        )
    own = Checkpoint([folder / WEIGHTS_FILE]).entries
    dropped = _dropped(mixture, own, manifest)
    options = mixture.record["options"]
    if dropped and options["shared"] == "seed" and not options["discard"]:
        raise UserError(
            f"'{name}' ({folder}) has its own {first_of(dropped)}, and this mixture has everything but feed-forwards from the seed; train it with --trains flexolmo or "
            "feed_forward, or merge again with --option discard=true"
        )
    public = next((expert.feed_forward for expert in mixture.experts if expert.name == PUBLIC), {})
    feed_forward = {}
    for tensor in mixture.experts[0].feed_forward:
        if tensor in own:
            feed_forward[tensor] = StoredTensor(own[tensor], manifest.tensors.get(tensor), name=tensor)
        elif tensor in public:
            feed_forward[tensor] = public[tensor]
        else:
            raise UserError(
                f"'{name}' ({folder}) did not change '{tensor}', and the mixture does not hold the seed's"
            )
    if not (folder / ROUTER_FILE).is_file():
        return ExpertParts(name, feed_forward), None, manifest
    choice = mixture.record["router"]["biases"]
    row = settle_bias(brought_by(folder, name, _scale(mixture)), choice if choice != "none" else "drop")
    return ExpertParts(name, feed_forward), row, manifest


def _dropped(mixture: OpenedMixture, own: Collection[str], manifest: Manifest) -> list[str]:
    """Return the tensors outside of its feed-forwards in which an expert differs from the mixture, which has no place for them."""
    inside = mixture.experts[0].feed_forward
    shared = {name: plan.experts[0].expected for name, plan in mixture.shared.items()}
    return [name for name in own if name not in inside and manifest.tensors.get(name) != shared.get(name)]


def _scale(mixture: OpenedMixture) -> float:
    return float(mixture.record["options"]["router_options"].get("scale", 1.0))


def _tensors(
    mixture: OpenedMixture,
    old: MixtureShape,
    shape: MixtureShape,
    experts: Sequence[ExpertParts],
    router: RouterParts,
) -> tuple[Any, dict[str, Any]]:
    """Return the planned tensors, and the configuration: the mixture's own, but for what the number of experts changes."""
    dense = mixture.record["dense"]
    tensors, config = plan_assembly(
        dense,
        mixture.family,
        mixture.target,
        shape,
        mixture.shared,
        experts,
        router,
        layout=mixture.record["options"]["layout"] if not mixture.record.get("tuned") else "per_expert",
    )
    before = mixture.target.config(dense, old)
    changed = {key: value for key, value in config.items() if before.get(key) != value}
    return tensors, {**mixture.source.config, **changed}


# --- what is said of it ---


def _licences(mixture: OpenedMixture, change: Change, joined: Mapping[str, Manifest]) -> LicenceReport:
    """Return how the licences of those go together who make up the changed mixture."""
    gone = {*change.remove, *change.replace}
    left = {parent.name: parent.licence for parent in mixture.manifest.parents if parent.name not in gone}
    means = [] if shares_its_rest_with_the_seed(mixture.manifest) else _averaged(mixture)
    return check_licences(
        {f"{one['name']} (in the mean)": one["licence"] for one in means if one["name"] not in left}
        | left
        | {name: one.licence for name, one in joined.items()}
    )


def history(manifest: Manifest, change: Change, when: datetime | None = None) -> list[dict[str, Any]]:
    """Return what a manifest says of a change: who left, joined or was replaced, on which day, and from what."""
    now = (when or datetime.now(UTC)).date().isoformat()
    words = [("left", name) for name in change.remove]
    words += [("replaced", name) for name in change.replace] + [("joined", name) for name in change.add]
    return [{"what": what, "expert": name, "when": now, "from": manifest.digest} for what, name in words]


def _traces(mixture: OpenedMixture, change: Change) -> list[str]:
    """Return what those who leave have left behind in what was trained jointly with them."""
    gone = [*change.remove, *change.replace]
    found = [
        f"'{name}' was in the mixture when its {tuning['trains']} was trained on {', '.join(tuning['domains'])}: those "
        "tensors have seen it"
        for tuning in mixture.record.get("tuned", ())
        for name in gone
        if name in tuning.get("experts", ())
    ]
    if not shares_its_rest_with_the_seed(mixture.manifest):
        means = {one["name"] for one in _averaged(mixture)}
        found += [
            f"all but feed-forwards and router stays a mean that '{name}' is part of; a merge without it has another"
            for name in gone
            if name in means
        ]
    found += [
        f"the one that takes the place of '{name}' brings no router row and keeps that of '{name}'"
        for name, folder in change.replace.items()
        if not (folder / ROUTER_FILE).is_file()
    ]
    for name, folder in {**change.replace, **change.add}.items():
        dropped = _dropped(mixture, Checkpoint([folder / WEIGHTS_FILE]).entries, read_manifest(folder))
        if dropped:
            found.append(f"{len(dropped)} tensors outside of the feed-forwards of '{name}' are dropped")
    if gone and mixture.record["router"].get("uses_text"):
        found.append(
            "the router's rows were fitted on text of all experts together, those who leave included"
        )
    return found


def _recipe(mixture: OpenedMixture, experts: Sequence[str]) -> Recipe:
    return Recipe(
        method=mixture.manifest.config["method"],
        models={mixture.manifest.name: mixture.source.folder},
        slices=whole_models(experts),
        seed=mixture.manifest.name,
    )


def _descent(
    mixture: OpenedMixture,
    change: Change,
    joined: Mapping[str, Manifest],
    record: Mapping[str, Any],
    licences: LicenceReport,
) -> Descent:
    manifest = mixture.manifest
    gone = {*change.remove, *change.replace}
    parents = [parent for parent in manifest.parents if parent.name not in gone]
    parents += [Parent.of(one, name) for name, one in joined.items()]
    sharing = [parent.name for parent in parents if parent.weight is not None or parent.name in joined]
    config = {
        **manifest.config,
        "mixture": dict(record),
        "weights": {name: 1 / len(sharing) for name in sharing},
    }
    if "averaged" in record:
        config["weights"] = dict(manifest.config.get("weights", {}))  # of the mean, which nobody left
    if "recipe" in config:
        recipe = _changed_recipe(config["recipe"], change)
        if recipe is None:
            config.pop("recipe")
        else:
            config["recipe"] = recipe
    parents = [
        replace(parent, weight=config["weights"][parent.name])
        if parent.name in config["weights"] and not ("averaged" in record and parent.name in joined)
        else parent
        for parent in parents
    ]
    data = {name: one for name, one in manifest.data.items() if name not in gone}
    data |= {name: one.data for name, one in joined.items()}
    return Descent(tuple(parents), config, data, licences.result if not licences.conflicts else None)


def _changed_recipe(recipe: Mapping[str, Any], change: Change) -> dict[str, Any] | None:
    """Return the recipe of a merge that would have given the changed mixture in the first place."""
    if len(recipe["slices"]) != 1:
        return None
    (part,) = recipe["slices"]
    gone = set(change.remove)
    sources = [one for one in part["sources"] if one["model"] not in gone]
    sources += [{"model": name, "layers": None, "parameters": {}} for name in change.add]
    models = [name for name in recipe["models"] if name not in gone] + list(change.add)
    return {**recipe, "models": models, "slices": [{**part, "sources": sources}]}
