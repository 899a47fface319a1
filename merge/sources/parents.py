"""Which experts a merge takes, whether they belong together, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...core.artefacts.digest_cache import digests_of_untouched
from ...core.artefacts.layout import Layout
from ...core.artefacts.lineage import (
    MANIFEST_NAMES,
    Manifest,
    Parent,
    digest_of_tensors,
    read_manifest,
    require_intact,
)
from ...core.artefacts.safetensors_io import Checkpoint
from ...core.errors import UserError, unknown_name
from .licences import licence_of_folder

SEED = "seed"


def expert_folders(layout: Layout, names: Sequence[str] | None, parent: Path) -> dict[str, Path]:
    """Return the folders of the named experts (default: every finished one), in the given order.

    A name that is no expert of the workspace may be a folder: a model of the same family, or an adapter.
    """
    finished = sorted(path.parent.name for path in parent.glob(f"*/{MANIFEST_NAMES['expert']}"))
    wanted = list(names) if names is not None else finished
    if not wanted:
        raise UserError("there is no finished expert to merge; train one with `expertctl train`")
    found: dict[str, Path] = {}
    for name in wanted:
        folder = parent / name
        if name not in finished:
            if folder.is_dir() and folder.parent == parent:
                raise UserError(f"expert '{name}' is not finished; go on with `expertctl train {name}`")
            folder = _outside_folder(layout, name)
            if not folder.is_dir():
                raise unknown_name("expert", name, finished, listed_as="finished")
        if folder.name in found:
            raise UserError(f"expert '{folder.name}' is named twice")
        found[folder.name] = folder
    return found


def _outside_folder(layout: Layout, name: str) -> Path:
    given = Path(name).expanduser()
    return given.resolve() if given.is_dir() or given.is_absolute() else (layout.root / given).resolve()


def check_lineage(
    seed: Path, experts: Mapping[str, Path], *, tensors: bool = True, unrelated: bool = False
) -> tuple[Manifest, dict[str, Manifest]]:
    """Return the manifests once they were checked; refuse experts of another seed or tokenizer.

    With `tensors` every byte is read; without, headers and all other files, and tensors are left to whoever reads
    them. Folders that are not ours have no manifest to check. `unrelated` lets experts of other seeds pass.
    """
    if not (seed / MANIFEST_NAMES["seed"]).is_file():
        raise UserError(f"there is no finished seed in {seed}")
    origin = read_manifest(seed)
    ours = {name: folder for name, folder in experts.items() if (folder / MANIFEST_NAMES["expert"]).is_file()}
    manifests = {name: read_manifest(folder) for name, folder in ours.items()}
    for name, manifest in manifests.items():
        if not unrelated:
            _require_same_seed(name, manifest, origin)
    for folder in (seed, *ours.values()):
        require_intact(folder, tensors=tensors)
    return origin, manifests


def _require_same_seed(name: str, manifest: Manifest, origin: Manifest) -> None:
    parent = next((parent for parent in manifest.parents if parent.kind == "seed"), None)
    if parent is None or parent.digest != origin.digest:
        theirs = parent.digest[:12] if parent else "none"
        raise UserError(
            f"expert '{name}' was branched from seed {theirs}, but this workspace's seed is {origin.digest[:12]}; "
            "experts of different seeds cannot be merged (insist with --allow-unrelated)"
        )
    if manifest.tokenizer != origin.tokenizer:
        raise UserError(
            f"expert '{name}' was trained with tokenizer {manifest.tokenizer[:12]}, the seed has "
            f"{origin.tokenizer[:12]}; their tensors mean different tokens"
        )


def parents_of(
    seed: Manifest, folders: Mapping[str, Path], experts: Mapping[str, Manifest], weights: Mapping[str, float]
) -> tuple[Parent, ...]:
    """Return what a generalist is made of, for its manifest: the seed first, models that are not ours by their tensors."""

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
