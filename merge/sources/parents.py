"""Selects the experts of a workspace's merge and checks their lineage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...core.artefacts.digests import MANIFEST_NAMES
from ...core.artefacts.layout import Layout
from ...core.errors import UserError, unknown_name
from ...core.manifests.manifest import Manifest
from ...core.manifests.verification import require_intact
from ...core.models.loading import require_same_configuration
from .models import Source

SEED = "seed"


def expert_folders(layout: Layout, names: Sequence[str] | None, parent: Path) -> dict[str, Path]:
    """Return the folders of the named experts (default: all finished experts), in the given order.

    A name can also be the folder of a model or adapter. Raises `UserError` for unknown, unfinished or repeated names.
    """
    finished = sorted(path.parent.name for path in parent.glob(f"*/{MANIFEST_NAMES['expert']}"))
    selected = list(names) if names is not None else finished
    if not selected:
        raise UserError("there are no finished experts to merge; train one with `expertctl train`")
    folders: dict[str, Path] = {}
    for name in selected:
        folder = parent / name
        if name not in finished:
            if folder.is_dir() and folder.parent == parent:
                raise UserError(f"expert '{name}' is not finished; resume it with `expertctl train {name}`")
            path = Path(name).expanduser()
            folder = (path if path.is_dir() else layout.root / path).resolve()
            if not folder.is_dir():
                raise unknown_name("expert", name, finished, listed_as="finished")
        if folder.name in folders:
            raise UserError(f"expert '{folder.name}' is named twice")
        folders[folder.name] = folder
    return folders


def check_lineage(sources: Mapping[str, Source], *, tensors: bool = True, unrelated: bool = False) -> None:
    """Check the seed and the experts of a workspace's merge against their manifests.

    With `tensors`, every byte is verified; otherwise, tensors are left to the code that reads them. Other models are
    not checked. Raises `UserError` for changed files and, unless `unrelated`, for experts with another seed or tokenizer.
    """
    seed = sources[SEED].manifest
    assert seed is not None
    manifests = {name: source.manifest for name, source in sources.items() if source.kind == "expert"}
    for name, manifest in manifests.items():
        if manifest is not None and not unrelated:
            _require_same_seed(name, manifest, seed)
    for name in (SEED, *manifests):
        require_intact(sources[name].folder, tensors=tensors, manifest=sources[name].manifest)


def _require_same_seed(name: str, manifest: Manifest, seed: Manifest) -> None:
    parent = next((parent for parent in manifest.parents if parent.kind == "seed"), None)
    if parent is None or parent.digest != seed.digest:
        theirs = parent.digest[:12] if parent else "none"
        raise UserError(
            f"expert '{name}' was branched from seed {theirs}, but this workspace's seed is {seed.digest[:12]}; "
            "experts of different seeds cannot be merged (override: --allow-unrelated)"
        )
    require_same_configuration(manifest, seed)
    if manifest.tokenizer != seed.tokenizer:
        raise UserError(
            f"expert '{name}' was trained with tokenizer {manifest.tokenizer[:12]}, but the seed has "
            f"{seed.tokenizer[:12]}; their embedding rows belong to different tokens"
        )
