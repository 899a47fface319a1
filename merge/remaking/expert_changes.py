"""Adds, removes and replaces experts of a generalist, without training; the result is a new generalist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...core.artefacts.digests import CARD_FILE
from ...core.artefacts.files import (
    exclusive_output,
    link_or_copy,
    new_folder,
    read_json,
    refuse_existing,
    resumable_folder,
    write_json,
)
from ...core.artefacts.layout import Layout
from ...core.errors import UserError, unknown_name
from ...core.manifests.finishing import finish_artefact
from ...core.manifests.generalist import MixtureRecord
from ...core.manifests.manifest import Manifest, read_manifest
from ...core.manifests.verification import require_intact
from ..ensemble.stored_mixer import stored_mixer
from ..generalists.card import model_card
from ..generalists.folder import write_generalist
from ..merging import MergeRun, merge_recipe
from ..mixture.changing import Change, history_entries, plan_change, require_valid_change
from ..mixture.opened import shared_tensors_are_the_seeds
from ..mixture.refitting import fitted_domains
from ..mixture.routing.stored_statistics import has_statistics, read_statistics
from ..planning.plan import check_output
from ..planning.used_text import Validation
from ..recipes.recipe import Recipe, change_models
from .reproducing import locate


def change_experts(
    folder: Path,
    output: Path,
    change: Change,
    *,
    layout: Layout | None = None,
    run: MergeRun | None = None,
    validation: Validation = tuple,
) -> Manifest:
    """Write the generalist of `folder` with changed experts to `output` and return its manifest.

    Mixtures are changed directly if possible; other generalists are merged again from their models, which are found by
    name. `validation` returns the text of the joining experts' domains, for a router that is computed from text. Raises
    `UserError` for unsupported changes before anything is written.
    """
    run = run or MergeRun()
    require_valid_change(change)
    manifest = read_manifest(folder)
    merged = manifest.merged
    if merged is None:
        raise UserError(f"{folder} is not a generalist, but of kind '{manifest.kind}'")
    if merged.kind == "ensemble":
        return _shrink_ensemble(folder, manifest, output, change, run)
    if merged.kind == "stitched":
        from ..stitched.changing import change_stitched  # needs torch

        return change_stitched(folder, output, change, force=run.force, allow_licences=run.allow_licences)
    if merged.mixture is not None and _is_changed_directly(manifest, merged.mixture, change):
        require_intact(folder, manifest=manifest)
        refuse_existing(output, force=run.force, what="generalist")
        plan, provenance = plan_change(
            folder, change, allow_licences=run.allow_licences, validation=validation, reporter=run.reporter
        )
        check_output(plan, output)
        with (
            exclusive_output(output, f"generalist {output}"),
            resumable_folder(output, force=run.force, resume=run.resume, what="generalist") as partial,
        ):
            return write_generalist(plan, partial, output.name, provenance=provenance, reporter=run.reporter)
    if merged.kind == "shared":
        raise UserError(
            f"{folder} was trained jointly by its owners, in rounds of '{merged.method}'; it has no experts to add or "
            "remove"
        )
    if merged.recipe is None:
        raise UserError(
            f"{folder} cannot be changed: method '{merged.method}' does not keep single experts; merge again with other "
            "--experts"
        )
    recipe = _changed_recipe(manifest, folder, change, layout)
    events = [*merged.history, *history_entries(manifest, change)]
    if not has_statistics(manifest):
        return merge_recipe(recipe, output, name=output.name, run=run, history=events)
    require_intact(folder, manifest=manifest)
    kept = {name: tensors for name, tensors in read_statistics(folder).items() if name not in change.removed}
    run.reporter.say(
        f"the router statistics of {', '.join(kept)} stay as measured: with the earlier mean of the tensors outside the "
        "feed-forward networks"
    )
    return merge_recipe(
        recipe,
        output,
        name=output.name,
        run=run,
        history=events,
        validation=validation,
        router_statistics=kept,
        fitted_on=fitted_domains(manifest, change.removed),
    )


def _is_changed_directly(manifest: Manifest, mixture: MixtureRecord, change: Change) -> bool:
    """Return whether a mixture can change without its parents; raises `UserError` if it cannot even with them."""
    if manifest.tunings:
        return True
    if not shared_tensors_are_the_seeds(mixture):
        return False
    if mixture.router.start == "embedding" or not (change.add or change.replace) or has_statistics(manifest):
        return True
    if mixture.router.uses_text:
        raise UserError(
            f"the router of '{manifest.name}' was fitted on the text of all experts, so experts cannot be added or replaced; merge "
            "again with all experts (with --option router=ridge, more can be added later)"
        )
    return False


def _shrink_ensemble(folder: Path, manifest: Manifest, output: Path, change: Change, run: MergeRun) -> Manifest:
    """Write an ensemble without some experts; the other files are linked and the prior is renormalised."""
    if change.add or change.replace:
        raise UserError(
            "experts cannot be added to an ensemble, because its prior is fitted; merge again, or for a DEMix model use "
            "`expertctl tune --trains demix_dapt`"
        )
    require_intact(folder, manifest=manifest)
    config = read_json(folder / "config.json")
    for name in change.remove:
        if name not in config["experts"]:
            raise unknown_name("expert", name, config["experts"], listed_as="the ensemble has")
    kept = [index for index, name in enumerate(config["experts"]) if name not in change.remove]
    if not kept:
        raise UserError("the change would remove all experts")
    mixer = stored_mixer(config.get("mixer"), config.get("mixer_settings"), folder).subset(kept)
    experts = [config["experts"][index] for index in kept]
    config |= {"experts": experts, "mixer_settings": mixer.settings()}
    with new_folder(output, force=run.force, what="generalist") as partial:
        for file in sorted(folder.rglob("*")):
            new_path = partial / file.relative_to(folder)
            is_removed = file.parent.name == "experts" and file.stem in change.remove
            if file.is_dir():
                new_path.mkdir(exist_ok=True)
            elif file.name not in ("config.json", "generalist.json", CARD_FILE) and not is_removed:
                link_or_copy(file, new_path)
        write_json(partial / "config.json", config)
        changed = _shrunk_manifest(manifest, change, output.name, experts)
        return finish_artefact(partial, changed, card=model_card)


def _shrunk_manifest(manifest: Manifest, change: Change, name: str, experts: Sequence[str]) -> Manifest:
    merged = manifest.merged
    assert merged is not None
    total = sum(share for expert, share in merged.weights.items() if expert in experts)
    shares = {expert: share / total for expert, share in merged.weights.items() if expert in experts}
    trained_inside = {expert for tuning in merged.tunings for expert in tuning.trained_inside}
    # removing an expert also removes tunings that only trained copies of it
    tunings = tuple(
        replace(
            tuning, left=tuning.left or (bool(tuning.copied_from) and set(tuning.copied_from) <= set(change.remove))
        )
        for tuning in merged.tunings
    )
    removed_names = {*change.remove, *(tuning.name for tuning in tunings if tuning.left)}
    parents = tuple(
        replace(parent, weight=shares[parent.name])
        if parent.name in shares and parent.name not in trained_inside
        else parent
        for parent in manifest.parents
        if parent.name not in change.remove
        or parent.name in trained_inside  # a parent of the whole model, not the expert of that name
    )
    new_config = replace(
        merged,
        weights=shares,
        experts=tuple(experts),
        history=(*merged.history, *history_entries(manifest, change)),
        tunings=tunings,
    )
    statements = {key: statement for key, statement in manifest.expert_data.items() if key not in removed_names}
    return replace(manifest, name=name, parents=parents, config=new_config, expert_data=statements)


def _changed_recipe(manifest: Manifest, folder: Path, change: Change, layout: Layout | None) -> Recipe:
    merged = manifest.merged
    assert merged is not None
    assert merged.recipe is not None
    known = merged.recipe["models"]
    for name in change.add:
        if name in known:
            raise UserError(f"'{name}' is already in {folder}; use `expertctl expert replace`")
    for name in (*change.remove, *change.replace):
        if name not in known:
            raise UserError(f"'{name}' is not a model of {folder}; it has {', '.join(known)}")
    content = change_models(merged.recipe, change.remove, change.add)
    references = {name: text for name, text in content["references"].items() if name not in change.replace}
    content["references"] = references
    if any(not output_slice["sources"] for output_slice in content["slices"]):
        raise UserError("the change would remove all experts")
    if merged.mixture is not None:
        count = len(merged.experts) - len(set(change.remove)) + len(change.add)
        content["scopes"] = [
            {**scope, "top_k": min(scope["top_k"], count)} if scope.get("top_k") is not None else scope
            for scope in content["scopes"]
        ]
    return locate(manifest, content, folder, layout, change.joining, require_digest=True)
