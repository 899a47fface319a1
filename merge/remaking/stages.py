"""Runs the merges of one file that take results of each other as inputs."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.artefacts.digests import MANIFEST_NAMES
from ...core.artefacts.files import refuse_existing
from ...core.errors import UserError
from ...core.manifests.manifest import Manifest, read_manifest
from ..merging import MergeRun, merge_recipe, plan_recipe
from ..recipes.mergekit_documents import Stage
from ..recipes.recipe import recipe_as_json


def merge_stages(stages: Sequence[Stage], run: MergeRun) -> list[Manifest]:
    """Run the merges in order and return their manifests; with `resume`, finished ones are kept.

    Everything that does not depend on a result is checked before the first merge; a merge that needs results is checked
    as soon as they exist. Raises `UserError`.
    """
    for stage in stages:
        if not _is_finished(stage, run):
            refuse_existing(stage.folder, force=run.force, what="generalist")
            if not stage.needs:
                plan_recipe(stage.recipe, stage.folder, run=run)
    manifests = []
    for number, stage in enumerate(stages, start=1):
        if _is_finished(stage, run):
            manifests.append(read_manifest(stage.folder))
            continue
        run.reporter.say(f"merge '{stage.name}' ({number} of {len(stages)})")
        manifests.append(merge_recipe(stage.recipe, stage.folder, run=run))
    return manifests


def _is_finished(stage: Stage, run: MergeRun) -> bool:
    """Return whether a stage can be skipped; raises `UserError` if its folder has the result of another recipe."""
    if not run.resume or not (stage.folder / MANIFEST_NAMES["generalist"]).is_file():
        return False
    merged = read_manifest(stage.folder).merged
    if merged is None or merged.recipe != recipe_as_json(stage.recipe):
        raise UserError(
            f"{stage.place}: {stage.folder} has the result of another recipe; remove it, or merge again with --force"
        )
    return True
