"""The members of a stitched model: whole models elsewhere that it refers to, or copies inside of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.digest_cache import digests_of_untouched
from ...core.artefacts.files import link_or_copy, read_json
from ...core.artefacts.lineage import (
    MANIFEST_NAMES,
    TOKENIZER_FILES,
    digest_of_tensors,
    manifest_path,
    read_manifest,
)
from ...core.artefacts.safetensors_io import INDEX_FILE, Checkpoint, checkpoint_files
from ...core.errors import UserError
from ...core.models.loading import load_network
from .stepwise import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .configuration import StitchedConfig

MEMBERS_FOLDER = "members"


def described(name: str, source: Path, seed: Path, folder: Path, *, self_contained: bool) -> dict[str, Any]:
    """Return what a stitched model in `folder` says of a member, having copied (or linked) it inside where asked to.

    Depth and width of an expert of ours are those of its `seed`.
    """
    manifest = read_manifest(source) if manifest_path(source) is not None else None
    place = source.resolve()
    if self_contained:
        place = folder / MEMBERS_FOLDER / name
        _copy_model(source, place)
    is_expert = manifest is not None and manifest.kind == "expert"
    config = read_json((seed if is_expert else source) / "config.json")
    return {
        "name": name,
        "folder": os.path.relpath(place, folder.resolve())
        if not self_contained
        else f"{MEMBERS_FOLDER}/{name}",
        "digest": _digest(source),
        "width": _setting(config, source, "hidden_size", "n_embd"),
        "num_layers": _setting(config, source, "num_hidden_layers", "n_layer"),
    }


def load_members(
    root: Path, config: StitchedConfig, dtype: Any
) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    """Load hub and experts, each tensor that an expert shares with the hub once.

    Raises `UserError` for a member that is not where it was, or is another by now.
    """
    wanted = str(dtype).removeprefix("torch.") if dtype is not None else "auto"
    hub_folder = _found(root, config.members[0])
    hub = load_network(hub_folder, dtype=wanted)
    experts = {}
    for member in config.members[1:]:
        folder = _found(root, member)
        kind = read_manifest(folder).kind if manifest_path(folder) is not None else None
        expert = load_network(
            folder, seed=hub_folder if kind == "expert" else None, dtype=wanted, as_trained=False
        )
        expert.to(hub.dtype)
        if kind == "expert":
            _share(expert, hub, set(Checkpoint([folder / "model.safetensors"])))
        experts[member["name"]] = expert
    return hub, experts


def embedded_members(root: Path, members: Mapping[str, PreTrainedModel]) -> list[dict[str, Any]]:
    """Write loaded members whole into `root` and return what its configuration says of them."""
    found = []
    for name, model in members.items():
        place = root / MEMBERS_FOLDER / name
        model.save_pretrained(place)
        found.append(
            {
                "name": name,
                "folder": f"{MEMBERS_FOLDER}/{name}",
                "digest": _digest(place),
                "width": int(model.config.hidden_size),
                "num_layers": len(decoder_layers(model)),
            }
        )
    return found


def move_members(members: Sequence[Mapping[str, Any]], old: Path, new: Path) -> list[dict[str, Any]]:
    """Return what another stitched folder says of the same members: copies go along, all others stay where they are."""
    found = []
    for member in members:
        source = (old / member["folder"]).resolve()
        if source.is_relative_to(old.resolve()):
            _copy_model(source, new / member["folder"])
            found.append(dict(member))
        else:
            found.append({**member, "folder": os.path.relpath(source, new.resolve())})
    return found


def _copy_model(source: Path, place: Path) -> None:
    """Link, or copy, the files that loading needs: nothing that says how a model was trained, and where."""
    place.mkdir(parents=True, exist_ok=True)
    names = {"config.json", "generation_config.json", INDEX_FILE, *TOKENIZER_FILES, *MANIFEST_NAMES.values()}
    for file in sorted(source.iterdir()):
        if (file.name in names or file.suffix == ".safetensors") and not (place / file.name).exists():
            link_or_copy(file, place / file.name)


def _found(root: Path, member: Mapping[str, Any]) -> Path:
    folder: Path = (root / member["folder"]).resolve()
    if not folder.is_dir():
        raise UserError(
            f"{root} is stitched to '{member['name']}' in {folder}, which is not there; put it back, or merge again with "
            "--self-contained"
        )
    if _digest(folder) != member["digest"]:
        raise UserError(
            f"{root} is stitched to '{member['name']}' as it was when they were merged, and {folder} is another by now; "
            "merge again"
        )
    return folder


def _digest(folder: Path) -> str:
    if manifest_path(folder) is not None:
        return read_manifest(folder).digest
    return digest_of_tensors(digests_of_untouched(Checkpoint(checkpoint_files(folder)), {}))


def _setting(config: Mapping[str, Any], folder: Path, *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise UserError(f"{folder / 'config.json'} has no {names[0]}: models of such a family cannot be stitched")


def _share(expert: PreTrainedModel, hub: PreTrainedModel, changed: set[str]) -> None:
    """Let an expert use the hub's own tensors where it did not change them."""
    theirs = dict(hub.named_parameters())
    for name, parameter in expert.named_parameters():
        if name not in changed and name in theirs:
            parameter.data = theirs[name].data
