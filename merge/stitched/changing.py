"""Add, remove and replace experts of a stitched model; the stitches of the other experts are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ...core.artefacts.digests import TOKENIZER_FILES
from ...core.artefacts.files import copy_files, exclusive_output, new_folder
from ...core.artefacts.safetensors_io import Checkpoint
from ...core.errors import UserError
from ...core.manifests.finishing import finish_artefact
from ...core.manifests.manifest import Manifest, read_manifest
from ...core.manifests.verification import require_intact
from ..generalists.card import model_card
from ..mixture.changing import (
    Change,
    changed_data,
    changed_parents,
    history_entries,
    require_expert_of,
    require_known_names,
)
from ..sources.licences import check_licences, require_compatible
from .configuration import StitchedConfig
from .container import STITCHES_FILE, new_stitches, write_stitched
from .layers import ExpertsIntoHub, module_key
from .members import add_member, move_members

NEW_EXPERT_GATE = -4.0
"""Initial gate logit of an added expert in the hub, small so that the trained model changes little."""


def change_stitched(
    folder: Path, output: Path, change: Change, *, force: bool = False, allow_licences: bool = False
) -> Manifest:
    """Write a changed stitched model to `output` without training, and return its manifest.

    Raises `UserError` for unknown or duplicate names, experts of another seed and incompatible licences.
    """
    manifest = require_intact(folder)
    merged = manifest.merged
    assert merged is not None
    config = StitchedConfig.from_pretrained(folder)
    hub, *experts = config.members
    names = [expert["name"] for expert in experts]
    require_known_names(names, change, "model")
    if set(names) == set(change.remove) and not change.add:
        raise UserError("the change leaves no expert; keep at least one")
    joining = {name: read_manifest(expert) for name, expert in change.joining.items()}
    for name, expert in joining.items():
        require_expert_of(hub["digest"], f"'{name}'", expert, "the hub is")
    parents = changed_parents(manifest, change, joining)
    licences = check_licences({parent.name: parent.licence for parent in parents})
    require_compatible(licences, allow_licences)
    root = folder.resolve()
    self_contained = any((root / member["folder"]).resolve().is_relative_to(root) for member in config.members)
    with (
        exclusive_output(output, f"generalist {output}"),
        new_folder(output, force=force, what="generalist") as partial,
    ):
        kept = [member for member in config.members if member["name"] not in change.removed]
        config.members = move_members(kept, folder, partial)
        config.members += [
            add_member(name, expert, (folder / hub["folder"]).resolve(), partial, self_contained=self_contained)
            for name, expert in change.joining.items()
        ]
        write_stitched(partial, config, _stitches(folder, config, change))
        copy_files(folder, partial, (*TOKENIZER_FILES, "generation_config.json"))
        shares = dict.fromkeys(config.expert_widths, 1 / len(config.expert_widths))
        changed = replace(
            manifest,
            name=output.name,
            parents=tuple(replace(parent, weight=shares.get(parent.name, parent.weight)) for parent in parents),
            config=replace(merged, weights=shares, history=(*merged.history, *history_entries(manifest, change))),
            expert_data=changed_data(manifest, change, joining),
            metrics={},
            tokenizer="",
            licence=licences.agreed,
        )
        return finish_artefact(partial, changed, card=model_card)


def _stitches(folder: Path, config: StitchedConfig, change: Change) -> nn.ModuleList:
    """Return the changed model's stitches: stored tensors of kept experts, initial ones of added experts."""
    stored = Checkpoint([folder / STITCHES_FILE])
    stitches = new_stitches(config)
    new_keys = {module_key(name) for name in change.joining}
    with torch.no_grad():
        for name, parameter in stitches.named_parameters(prefix="stitches"):
            if new_keys.isdisjoint(name.split(".")):
                parameter.copy_(stored.read(name))
        for stitch in stitches:
            if isinstance(stitch, ExpertsIntoHub):
                for key in new_keys:
                    stitch.gates[key].get_parameter("bias").fill_(NEW_EXPERT_GATE)
    return stitches
