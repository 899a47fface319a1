"""Add, remove and replace experts of a stitched model; the stitches of the other experts are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.artefacts.digests import TOKENIZER_FILES
from ...core.artefacts.files import exclusive_output, link_or_copy, new_folder
from ...core.errors import UserError, unknown_name
from ...core.manifests.finishing import finish_artefact
from ...core.manifests.manifest import Manifest, Parent, read_manifest
from ...core.manifests.verification import require_intact
from ..generalists.card import model_card
from ..mixture.changing import Change, history_entries
from ..sources.licences import check_licences, require_compatible

NEW_EXPERT_GATE = -4.0
"""Initial gate logit of an added expert in the hub, small so that the trained model changes little."""


def change_stitched(
    folder: Path, output: Path, change: Change, *, force: bool = False, allow_licences: bool = False
) -> Manifest:
    """Write a changed stitched model to `output` without training, and return its manifest.

    Raises `UserError` for unknown or duplicate names, experts of another seed and incompatible licences.
    """
    from .configuration import StitchedConfig
    from .container import write_config, write_stitches
    from .members import add_member, move_members

    require_intact(folder)
    manifest = read_manifest(folder)
    old = StitchedConfig.from_pretrained(folder)
    names = [member["name"] for member in old.members[1:]]
    _check(names, change)
    seed_folder = (folder / old.members[0]["folder"]).resolve()
    self_contained = any(
        (folder / member["folder"]).resolve().is_relative_to(folder.resolve()) for member in old.members
    )
    joining = {**change.replace, **change.add}
    joined = {name: read_manifest(source) for name, source in joining.items()}
    _check_seed(old.members[0]["digest"], joined)
    removed = {*change.remove, *change.replace}
    kept_licences = {parent.name: parent.licence for parent in manifest.parents if parent.name not in removed}
    licences = check_licences(kept_licences | {name: expert.licence for name, expert in joined.items()})
    require_compatible(licences, allow_licences)
    with (
        exclusive_output(output, f"generalist {output}"),
        new_folder(output, force=force, what="generalist") as partial,
    ):
        kept = [member for member in old.members if member["name"] not in removed]
        added = [
            add_member(name, source, seed_folder, partial, self_contained=self_contained)
            for name, source in joining.items()
        ]
        config = StitchedConfig.from_dict(old.to_dict())
        config.members = [*move_members(kept, folder, partial), *added]
        write_stitches(partial, _stitches(folder, old, config, set(joining)))
        for file in (*TOKENIZER_FILES, "generation_config.json"):
            if (folder / file).is_file():
                link_or_copy(folder / file, partial / file)
        write_config(partial, config)
        changed = _manifest(manifest, change, joined, output.name, list(config.expert_widths))
        licence = licences.result if not licences.conflicts else None
        return finish_artefact(partial, replace(changed, tokenizer="", licence=licence), card=model_card)


def _check(names: list[str], change: Change) -> None:
    for name in (*change.remove, *change.replace):
        if name not in names:
            raise unknown_name("expert", name, names, listed_as="the model has")
    for name in change.add:
        if name in names:
            raise UserError(f"'{name}' is in the model already; use `expertctl expert replace`")
    if set(names) == set(change.remove) and not change.add:
        raise UserError("the change leaves no expert; keep at least one")


def _check_seed(seed: str, joined: Mapping[str, Manifest]) -> None:
    for name, manifest in joined.items():
        expert_seed = next((parent.digest for parent in manifest.parents if parent.kind == "seed"), None)
        if manifest.kind != "expert" or expert_seed != seed:
            raise UserError(
                f"'{name}' is {manifest.kind} of seed {str(expert_seed)[:12]}, and the hub is seed "
                f"{seed[:12]}; train the expert from the hub's seed"
            )


def _stitches(folder: Path, old: Any, new: Any, joining: set[str]) -> Any:
    """Return the new model's stitches: stored tensors of kept experts, initial ones of added experts."""
    import torch

    from ...core.artefacts.safetensors_io import Checkpoint
    from .container import STITCHES_FILE, new_stitches
    from .layers import ExpertsIntoHub, module_keys

    stored = Checkpoint([folder / STITCHES_FILE])
    stitches = new_stitches(new)
    new_keys = set(module_keys(joining))
    with torch.no_grad():
        for name, parameter in stitches.named_parameters(prefix="stitches"):
            if new_keys.isdisjoint(name.split(".")):
                parameter.copy_(stored.read(name))
        for stitch in stitches:
            if isinstance(stitch, ExpertsIntoHub):
                for key in new_keys:
                    stitch.gates[key].get_parameter("bias").fill_(NEW_EXPERT_GATE)
    return stitches


def _manifest(
    manifest: Manifest, change: Change, joined: Mapping[str, Manifest], name: str, experts: list[str]
) -> Manifest:
    removed = {*change.remove, *change.replace}
    merged = manifest.merged
    assert merged is not None
    shares = dict.fromkeys(experts, 1 / len(experts))
    parents = [parent for parent in manifest.parents if parent.name not in removed]
    parents += [Parent.of(expert_manifest, expert) for expert, expert_manifest in joined.items()]
    statements = {key: data for key, data in manifest.expert_data.items() if key not in removed}
    return replace(
        manifest,
        name=name,
        parents=tuple(
            replace(parent, weight=shares[parent.name]) if parent.name in shares else parent for parent in parents
        ),
        config=replace(merged, weights=shares, history=(*merged.history, *history_entries(manifest, change))),
        expert_data=statements | {expert: expert_manifest.data for expert, expert_manifest in joined.items()},
        metrics={},
    )
