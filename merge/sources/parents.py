"""Selects the experts of a merge, checks their lineage, and records them as parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...core.artefacts.digest_cache import digests_of_untouched
from ...core.artefacts.digests import MANIFEST_NAMES, digest_of_tensors
from ...core.artefacts.layout import Layout
from ...core.artefacts.safetensors_io import Checkpoint
from ...core.errors import UserError, unknown_name
from ...core.manifests.manifest import Manifest, Parent, read_manifest
from ...core.manifests.verification import require_intact
from .licences import licence_of_folder

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
            folder = _outside_folder(layout, name)
            if not folder.is_dir():
                raise unknown_name("expert", name, finished, listed_as="finished")
        if folder.name in folders:
            raise UserError(f"expert '{folder.name}' is named twice")
        folders[folder.name] = folder
    return folders


def _outside_folder(layout: Layout, name: str) -> Path:
    path = Path(name).expanduser()
    return path.resolve() if path.is_dir() or path.is_absolute() else (layout.root / path).resolve()


def check_lineage(
    seed: Path, experts: Mapping[str, Path], *, tensors: bool = True, unrelated: bool = False
) -> tuple[Manifest, dict[str, Manifest]]:
    """Check the seed and the experts against their manifests and return the manifests.

    With `tensors`, every byte is verified; otherwise, tensors are left to the code that reads them. Folders without a
    manifest are not checked. Raises `UserError` for changed files and, unless `unrelated`, for experts with another
    seed or tokenizer.
    """
    if not (seed / MANIFEST_NAMES["seed"]).is_file():
        raise UserError(f"{seed} has no finished seed; make it with `expertctl seed`")
    seed_manifest = read_manifest(seed)
    with_manifest = {name: folder for name, folder in experts.items() if (folder / MANIFEST_NAMES["expert"]).is_file()}
    manifests = {name: read_manifest(folder) for name, folder in with_manifest.items()}
    for name, manifest in manifests.items():
        if not unrelated:
            _require_same_seed(name, manifest, seed_manifest)
    for folder in (seed, *with_manifest.values()):
        require_intact(folder, tensors=tensors)
    return seed_manifest, manifests


def _require_same_seed(name: str, manifest: Manifest, seed: Manifest) -> None:
    parent = next((parent for parent in manifest.parents if parent.kind == "seed"), None)
    if parent is None or parent.digest != seed.digest:
        theirs = parent.digest[:12] if parent else "none"
        raise UserError(
            f"expert '{name}' was branched from seed {theirs}, but this workspace's seed is {seed.digest[:12]}; "
            "experts of different seeds cannot be merged (override: --allow-unrelated)"
        )
    if manifest.tokenizer != seed.tokenizer:
        raise UserError(
            f"expert '{name}' was trained with tokenizer {manifest.tokenizer[:12]}, but the seed has "
            f"{seed.tokenizer[:12]}; their embedding rows belong to different tokens"
        )


def parents_of(
    seed: Manifest, folders: Mapping[str, Path], experts: Mapping[str, Manifest], weights: Mapping[str, float]
) -> tuple[Parent, ...]:
    """Return the parents of a generalist for its manifest, the seed first.

    Models without a manifest are identified by the digest of their tensors.
    """

    def of_folder(name: str, folder: Path) -> Parent:
        digest = digest_of_tensors(digests_of_untouched(Checkpoint.of_folder(folder), {}))
        return Parent("model", name, digest, weights.get(name), licence=licence_of_folder(folder))

    return (
        Parent.of(seed, SEED),
        *(
            Parent.of(experts[name], name, weights.get(name)) if name in experts else of_folder(name, folder)
            for name, folder in folders.items()
        ),
    )
