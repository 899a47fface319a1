"""Experts that leave a stitched model or join it: everybody else's stitches stay, to be trained on from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.artefacts.files import exclusive, link_or_copy, new_folder, write_text
from ...core.artefacts.lineage import (
    TOKENIZER_FILES,
    Manifest,
    Parent,
    digest_of_tensors,
    digest_of_tokenizer,
    digests_of_folder,
    read_manifest,
    require_intact,
)
from ...core.errors import UserError, unknown_name
from ..generalists.card import CARD_FILE, model_card
from ..mixture.changing import Change, history
from ..sources.licences import check_licences, require_compatible

JOINING_GATE = -4.0
"""Logit of the hub's gate for who joins: the others were trained without, and are to be disturbed little at first."""


def change_stitched(
    folder: Path, output: Path, change: Change, *, force: bool = False, allow_licences: bool = False
) -> Manifest:
    """Write a stitched model with other experts to `output` and return its manifest; nothing is trained.

    Raises `UserError` for names that do not fit, experts of another seed, and licences that contradict each other.
    """
    from .configuration import StitchedConfig
    from .container import write_config, write_stitches
    from .members import described, move_members

    require_intact(folder)
    manifest = read_manifest(folder)
    old = StitchedConfig.from_pretrained(folder)
    names = [one["name"] for one in old.members[1:]]
    _check(names, change)
    seed_folder = (folder / old.members[0]["folder"]).resolve()
    inside = any((folder / one["folder"]).resolve().is_relative_to(folder.resolve()) for one in old.members)
    joining = {**change.replace, **change.add}
    joined = {name: read_manifest(source) for name, source in joining.items()}
    _check_seed(old.members[0]["digest"], joined)
    gone = {*change.remove, *change.replace}
    left = {parent.name: parent.licence for parent in manifest.parents if parent.name not in gone}
    licences = check_licences(left | {name: one.licence for name, one in joined.items()})
    require_compatible(licences, allow_licences)
    lock = output.with_name(f".{output.name}.lock")
    try:
        with (
            exclusive(lock, f"generalist {output}"),
            new_folder(output, force=force, what="generalist") as partial,
        ):
            kept = move_members([one for one in old.members if one["name"] not in gone], folder, partial)
            brought = [
                described(name, source, seed_folder, partial, self_contained=inside)
                for name, source in joining.items()
            ]
            config = StitchedConfig.from_dict(old.to_dict())
            config.members = [*kept, *brought]
            write_stitches(partial, _stitches(folder, old, config, set(joining)))
            for file in (*TOKENIZER_FILES, "generation_config.json"):
                if (folder / file).is_file():
                    link_or_copy(folder / file, partial / file)
            write_config(partial, config)
            changed = _manifest(manifest, change, joined, output.name, list(config.expert_widths))
            licence = licences.result if not licences.conflicts else None
            changed = replace(changed, tokenizer=digest_of_tokenizer(partial), licence=licence)
            write_text(partial / CARD_FILE, model_card(changed))
            tensors, files = digests_of_folder(partial)
            changed = replace(changed, tensors=tensors, files=files, digest=digest_of_tensors(tensors))
            changed.write(partial)
    finally:
        lock.unlink(missing_ok=True)
    return changed


def _check(names: list[str], change: Change) -> None:
    for name in (*change.remove, *change.replace):
        if name not in names:
            raise unknown_name("expert", name, names, listed_as="the model has")
    for name in change.add:
        if name in names:
            raise UserError(f"'{name}' is in the model already; use `expertctl expert replace`")
    if set(names) == set(change.remove) and not change.add:
        raise UserError("no expert would be left")


def _check_seed(seed: str, joined: Mapping[str, Manifest]) -> None:
    for name, manifest in joined.items():
        theirs = next((parent.digest for parent in manifest.parents if parent.kind == "seed"), None)
        if manifest.kind != "expert" or theirs != seed:
            raise UserError(
                f"'{name}' is {manifest.kind} of seed {str(theirs)[:12]}, and the hub is seed {seed[:12]}"
            )


def _stitches(folder: Path, old: Any, new: Any, joining: set[str]) -> Any:
    """Return the new model's stitches: the old ones' tensors, and a start of their own for those who join."""
    import torch

    from ...core.artefacts.safetensors_io import Checkpoint
    from .container import STITCHES_FILE, new_stitches
    from .layers import ExpertsIntoHub, keys_of

    stored = Checkpoint([folder / STITCHES_FILE])
    stitches = new_stitches(new)
    fresh = set(keys_of(joining))
    with torch.no_grad():
        for name, parameter in stitches.named_parameters(prefix="stitches"):
            if fresh.isdisjoint(name.split(".")):
                parameter.copy_(stored.read(name))
        for stitch in stitches:
            if isinstance(stitch, ExpertsIntoHub):
                for key in fresh:
                    stitch.gates[key].get_parameter("bias").fill_(JOINING_GATE)
    return stitches


def _manifest(
    manifest: Manifest, change: Change, joined: Mapping[str, Manifest], name: str, experts: list[str]
) -> Manifest:
    gone = {*change.remove, *change.replace}
    record = dict(manifest.config.get("mixture") or {})
    record["history"] = [*record.get("history", ()), *history(manifest, change)]
    shares = dict.fromkeys(experts, 1 / len(experts))
    parents = [parent for parent in manifest.parents if parent.name not in gone]
    parents += [Parent.of(one, expert) for expert, one in joined.items()]
    data = {key: value for key, value in manifest.data.items() if key not in gone}
    return replace(
        manifest,
        name=name,
        parents=tuple(
            replace(parent, weight=shares[parent.name]) if parent.name in shares else parent
            for parent in parents
        ),
        config={**manifest.config, "weights": shares, "mixture": record},
        data=data | {expert: one.data for expert, one in joined.items()},
        metrics={},
    )
