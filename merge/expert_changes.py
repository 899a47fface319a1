"""Generalists without an expert, with one more, or with another in its place: no training, and the old one stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..core.errors import UserError
from ..core.files import exclusive, refuse_existing, resumable_folder
from ..core.lineage import Manifest, read_manifest, require_intact
from ..core.workspace import Layout
from .generalist import write_generalist
from .merging import MergeRun, merge_recipe
from .mixture.changing import Change, plan_change, shares_its_rest_with_the_seed
from .plan import check_output
from .recipe import recipe_from_json
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
    manifest = read_manifest(folder)
    if manifest.kind != "generalist":
        raise UserError(f"{folder} is no generalist, but a {manifest.kind}")
    record = manifest.config.get("mixture") or {}
    if record and (shares_its_rest_with_the_seed(manifest) or record.get("tuned")):
        return _change_mixture(folder, output, change, how)
    if "recipe" not in manifest.config:
        raise UserError(
            f"{folder} cannot be changed by itself: it is made by '{manifest.config.get('method')}', which keeps nothing "
            "of single experts; merge again with other --experts"
        )
    recipe = recipe_without_and_with(manifest, folder, change, layout, models or {})
    return merge_recipe(recipe_from_json(*recipe), output, name=output.name, run=how)


def _change_mixture(folder: Path, output: Path, change: Change, how: MergeRun) -> Manifest:
    require_intact(folder)
    lock = output.with_name(f".{output.name}.lock")
    refuse_existing(output, force=how.force, what="generalist")
    changed = plan_change(folder, change)
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
    given = {**models, **change.replace, **change.add}
    found = locate(content, folder, layout, given)
    return content, {
        **found.models,
        **{f"base of {name}": path for name, path in found.adapter_bases.items()},
    }
