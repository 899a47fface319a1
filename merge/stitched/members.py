"""Members of a stitched model: complete models that it references, or copies in its own folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...core.artefacts.digest_cache import digests_of_untouched
from ...core.artefacts.digests import MANIFEST_NAMES, TOKENIZER_FILES, digest_of_tensors
from ...core.artefacts.files import link_or_copy, read_json
from ...core.artefacts.safetensors_io import INDEX_FILE, Checkpoint, checkpoint_files
from ...core.errors import UserError
from ...core.manifests.manifest import Manifest, find_manifest
from ...core.models.adapters.folder import ADAPTER_CONFIG
from ...core.models.adapters.prompts import refuse_prompt
from ...core.models.loading import changed_tensors, load_network
from ...core.models.stored_names import StoredNames
from .configuration import StitchedConfig
from .layer_probe import require_steps
from .stepwise import decoder_layers

MEMBERS_FOLDER = "members"


def add_member(name: str, source: Path, seed: Path, folder: Path, *, self_contained: bool) -> dict[str, Any]:
    """Return a member's entry, copied to `folder` if `self_contained`; an expert's sizes are those of its `seed`."""
    refuse_prompt(source, "stitching")
    manifest = find_manifest(source)
    place = f"{MEMBERS_FOLDER}/{name}" if self_contained else os.path.relpath(source.resolve(), folder.resolve())
    if self_contained:
        _copy_model(source, folder / place)
    is_expert = manifest is not None and manifest.kind == "expert"
    config = require_steps(read_json((seed if is_expert else source) / "config.json"))
    return {
        "name": name,
        "folder": place,
        "digest": _digest(source, manifest),
        "width": int(config.hidden_size),
        "num_layers": int(config.num_hidden_layers),
    }


def load_members(root: Path, config: StitchedConfig, dtype: Any) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    """Load hub and experts, shared tensors once; raises `UserError` for a member that is missing or has changed."""
    dtype_name = str(dtype).removeprefix("torch.") if dtype is not None else "auto"
    hub_folder, _ = _open_member(root, config.members[0])
    hub = load_network(hub_folder, dtype=dtype_name)
    hub_parameters = dict(hub.named_parameters())
    experts = {}
    for member in config.members[1:]:
        folder, manifest = _open_member(root, member)
        is_expert = manifest is not None and manifest.kind == "expert"
        expert = load_network(folder, seed=hub_folder if is_expert else None, dtype=dtype_name, as_trained=False)
        expert.to(hub.dtype)
        if is_expert:
            changed = StoredNames(expert).behind(changed_tensors(folder, hub_folder))
            for name, parameter in expert.named_parameters():
                if name not in changed and name in hub_parameters:
                    parameter.data = hub_parameters[name].data
        experts[member["name"]] = expert
    return hub, experts


def write_members(root: Path, members: Mapping[str, PreTrainedModel]) -> list[dict[str, Any]]:
    """Write complete copies of loaded members below `root` and return their configuration entries."""
    for name, model in members.items():
        model.save_pretrained(root / MEMBERS_FOLDER / name)
    return [
        {
            "name": name,
            "folder": f"{MEMBERS_FOLDER}/{name}",
            "digest": _digest(root / MEMBERS_FOLDER / name, None),
            "width": int(model.config.hidden_size),
            "num_layers": len(decoder_layers(model)),
        }
        for name, model in members.items()
    ]


def move_members(members: Sequence[Mapping[str, Any]], old: Path, new: Path) -> list[dict[str, Any]]:
    """Move members to another folder: copy internal ones, adjust references; return their entries."""
    entries = []
    for member in members:
        source = (old / member["folder"]).resolve()
        if source.is_relative_to(old.resolve()):
            _copy_model(source, new / member["folder"])
            entries.append(dict(member))
        else:
            entries.append({**member, "folder": os.path.relpath(source, new.resolve())})
    return entries


def _copy_model(source: Path, folder: Path) -> None:
    """Link or copy the files needed for loading, without records of the training."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"config.json", ADAPTER_CONFIG, "generation_config.json", INDEX_FILE, *TOKENIZER_FILES}
    names |= set(MANIFEST_NAMES.values())
    for file in sorted(source.iterdir()):
        if (file.name in names or file.suffix == ".safetensors") and not (folder / file.name).exists():
            link_or_copy(file, folder / file.name)


def _open_member(root: Path, member: Mapping[str, Any]) -> tuple[Path, Manifest | None]:
    """Return the folder of a member and its manifest; raises `UserError` if it is missing or has changed."""
    folder: Path = (root / member["folder"]).resolve()
    if not folder.is_dir():
        raise UserError(
            f"{root} references member '{member['name']}' in {folder}, which does not exist; restore it, or "
            "merge again with --self-contained"
        )
    manifest = find_manifest(folder)
    if _digest(folder, manifest) != member["digest"]:
        raise UserError(
            f"{root} references member '{member['name']}' in {folder}, which has changed since the merge; "
            "restore it, or merge again"
        )
    return folder, manifest


def _digest(folder: Path, manifest: Manifest | None) -> str:
    if manifest is not None:
        return manifest.digest
    return digest_of_tensors(digests_of_untouched(Checkpoint(checkpoint_files(folder)), {}))
