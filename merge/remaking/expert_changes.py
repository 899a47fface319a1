"""Generalists without an expert, with one more, or with another in its place: no training, and the old one stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.artefacts.files import (
    exclusive,
    link_or_copy,
    new_folder,
    read_json,
    refuse_existing,
    resumable_folder,
    write_json,
    write_text,
)
from ...core.artefacts.layout import Layout
from ...core.artefacts.lineage import (
    Manifest,
    digest_of_tensors,
    digests_of_folder,
    read_manifest,
    require_intact,
)
from ...core.errors import UserError, unknown_name
from ..generalists.card import CARD_FILE, model_card
from ..generalists.folder import write_generalist
from ..merging import MergeRun, merge_recipe
from ..mixture.changing import Change, history, plan_change, require_sense, shares_its_rest_with_the_seed
from ..planning.plan import check_output
from ..recipes.recipe import recipe_from_json
from ..sources.history import history_of
from ..stitched.changing import change_stitched
from .reproducing import locate


def change_experts(
    folder: Path,
    output: Path,
    change: Change,
    *,
    layout: Layout | None = None,
    models: Mapping[str, Path] | None = None,
    run: MergeRun | None = None,
) -> Manifest:
    """Write `folder`'s generalist with other experts to `output` and return its manifest.

    A mixture is changed by itself; any other merge is made again from its models, which `models` says where to find
    if not by their names. Raises `UserError` for what is not possible, with nothing written.
    """
    how = run or MergeRun()
    require_sense(change)
    manifest = read_manifest(folder)
    if manifest.kind != "generalist":
        raise UserError(f"{folder} is no generalist, but of kind {manifest.kind}")
    record = manifest.config.get("mixture") or {}
    if manifest.config.get("kind") == "ensemble":
        return _shrink_ensemble(folder, output, change, how)
    if manifest.config.get("kind") == "stitched":
        return change_stitched(
            folder, output, change, force=how.force, allow_licences=how.permissions.licences
        )
    if record and _changes_by_itself(manifest, change):
        return _change_mixture(folder, output, change, how)
    if manifest.config.get("kind") == "shared":
        raise UserError(
            f"{folder} was trained by its owners together, in rounds of '{manifest.config.get('method')}': nobody can be taken "
            "out of it or put into it"
        )
    if "recipe" not in manifest.config:
        raise UserError(
            f"{folder} cannot be changed by itself: it is made by '{manifest.config.get('method')}', which keeps nothing "
            "of single experts; merge again with other --experts"
        )
    recipe = recipe_without_and_with(manifest, folder, change, layout, models or {})
    events = [*history_of(manifest), *history(manifest, change)]
    return merge_recipe(recipe_from_json(*recipe), output, name=output.name, run=how, history=events)


def _changes_by_itself(manifest: Manifest, change: Change) -> bool:
    """Tell whether a mixture's own files, and those who join, are all that a change needs.

    Raises `UserError` where even the models that it was made of do not suffice.
    """
    record = manifest.config["mixture"]
    if record.get("tuned"):
        return True
    if not shares_its_rest_with_the_seed(manifest):
        return False
    if record["router"]["start"] == "embedding" or not (change.add or change.replace):
        return True
    if record["router"].get("uses_text"):
        raise UserError(
            f"the router of '{manifest.name}' was fitted on text of all its experts together, so that none can join "
            "or be replaced alone; merge again with all of them"
        )
    return False


def _change_mixture(folder: Path, output: Path, change: Change, how: MergeRun) -> Manifest:
    require_intact(folder)
    lock = output.with_name(f".{output.name}.lock")
    refuse_existing(output, force=how.force, what="generalist")
    changed = plan_change(folder, change, allow_licences=how.permissions.licences)
    check_output(changed.plan, output)
    with exclusive(lock, f"generalist {output}"):
        try:
            for note in changed.plan.notes:
                how.say(note)
            with resumable_folder(output, force=how.force, resume=how.resume, what="generalist") as partial:
                return write_generalist(
                    changed.plan, partial, output.name, descent=changed.descent, say=how.say, tell=how.tell
                )
        finally:
            lock.unlink(missing_ok=True)


def _shrink_ensemble(folder: Path, output: Path, change: Change, how: MergeRun) -> Manifest:
    """Write an ensemble without some of its experts: the others' files are linked, their prior is scaled up."""
    if change.add or change.replace:
        raise UserError(
            "experts join an ensemble by merging again, since their share in the prior is fitted; or, for a DEMix model, by "
            "`expertctl tune --trains demix_dapt`"
        )
    require_intact(folder)
    manifest = read_manifest(folder)
    config = read_json(folder / "config.json")
    for name in change.remove:
        if name not in config["experts"]:
            raise unknown_name("expert", name, config["experts"], listed_as="the ensemble has")
    kept = {
        name: share
        for name, share in zip(config["experts"], config["prior"], strict=True)
        if name not in change.remove
    }
    total = sum(kept.values())
    if not kept or not total > 0:
        raise UserError("no expert would be left")
    top = config.get("top_experts")
    config |= {
        "experts": list(kept),
        "prior": [share / total for share in kept.values()],
        "top_experts": min(top, len(kept)) if top is not None else None,
    }
    with new_folder(output, force=how.force, what="generalist") as partial:
        for file in sorted(folder.rglob("*")):
            place = partial / file.relative_to(folder)
            gone = file.parent.name == "experts" and file.stem in change.remove
            if file.is_dir():
                place.mkdir(exist_ok=True)
            elif file.name not in ("config.json", "generalist.json", CARD_FILE) and not gone:
                link_or_copy(file, place)
        write_json(partial / "config.json", config)
        changed = _without(manifest, change, output.name, config)
        write_text(partial / CARD_FILE, model_card(changed))
        tensors, files = digests_of_folder(partial)
        changed = replace(changed, tensors=tensors, files=files, digest=digest_of_tensors(tensors))
        changed.write(partial)
    return changed


def _without(manifest: Manifest, change: Change, name: str, config: Mapping[str, Any]) -> Manifest:
    """Return the manifest of an ensemble that some have left."""
    record = dict(manifest.config.get("mixture") or {})
    shares = dict(zip(config["experts"], config["prior"], strict=True))
    record["experts"] = list(shares)
    record["history"] = [*record.get("history", ()), *history(manifest, change)]
    made = {one for tuning in record.get("tuned", ()) for one in tuning.get("made", ())}
    if "tuned" in record:  # an expert that trained alone takes along all that has seen its text
        record["tuned"] = [
            {**one, "left": True} if _is_gone(one, change.remove) else one for one in record["tuned"]
        ]
    left = {one["name"] for one in record.get("tuned", ()) if one.get("left")}
    parents = tuple(
        replace(parent, weight=shares[parent.name])
        if parent.name in shares and parent.name not in made
        else parent
        for parent in manifest.parents
        if parent.name not in change.remove
        or parent.name in made  # of what it was trained from, not of the expert
    )
    return replace(
        manifest,
        name=name,
        parents=parents,
        config={**manifest.config, "weights": shares, "mixture": record},
        data={key: value for key, value in manifest.data.items() if key not in {*change.remove, *left}},
    )


def _is_gone(tuning: Mapping[str, Any], gone: Sequence[str]) -> bool:
    trained = tuning.get("began_as", {})
    return bool(trained) and set(trained) <= set(gone)


def recipe_without_and_with(
    manifest: Manifest,
    folder: Path,
    change: Change,
    layout: Layout | None,
    models: Mapping[str, Path],
) -> tuple[dict[str, object], dict[str, Path]]:
    """Return a merge's recipe with other experts, as JSON, and the folders of its models."""
    recipe = manifest.config["recipe"]
    gone = set(change.remove)
    for name in change.add:
        if name in recipe["models"]:
            raise UserError(f"'{name}' is in {folder} already; use `expertctl expert replace`")
    for name in (*change.remove, *change.replace):
        if name not in recipe["models"]:
            raise UserError(f"'{name}' is no model of {folder}; it has {', '.join(recipe['models'])}")
    slices = [
        {
            **part,
            "sources": [one for one in part["sources"] if one["model"] not in gone]
            + [{"model": name, "layers": None, "parameters": {}} for name in change.add],
        }
        for part in recipe["slices"]
    ]
    if any(not part["sources"] for part in slices):
        raise UserError("no expert would be left")
    names = [name for name in recipe["models"] if name not in gone]
    content = {**recipe, "models": [*names, *change.add], "slices": slices}
    if manifest.config.get("mixture"):
        count = len(manifest.config["mixture"]["experts"]) - len(gone) + len(change.add)
        content["scopes"] = [_with_possible_top_k(scope, count) for scope in recipe["scopes"]]
    given = {**models, **change.replace, **change.add}
    found = locate(manifest, content, folder, layout, given, insist=True)
    return content, {
        **found.models,
        **{f"base of {name}": path for name, path in found.adapter_bases.items()},
    }


def _with_possible_top_k(options: Mapping[str, Any], experts: int) -> dict[str, Any]:
    top_k = options.get("top_k")
    return {**options, **({"top_k": min(top_k, experts)} if top_k is not None else {})}
