"""Workspace layout: the folder with `expertctl.yaml` and the paths of its artefacts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError, unknown_name
from .digests import MANIFEST_NAMES

CONFIG_FILE = "expertctl.yaml"
STATISTICS_FOLDER = "statistics"
STATISTICS_FORMAT = 1
STATISTICS_WEIGHTS = "statistics.safetensors"
STATISTICS_MANIFEST = "statistics.json"
INDEX_MANIFEST = "index.json"
MEMORY_MANIFEST = "memory.json"


class Layout:
    """The folders of one workspace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config_file = root / CONFIG_FILE
        self.corpora = root / "corpora"
        self.seed = root / "seed"
        self.experts = root / "experts"
        self.baselines = root / "baselines"
        """Experts and generalists for comparison only; `train --all` and merges ignore them."""
        self.generalists = root / "generalists"
        self.statistics = root / STATISTICS_FOLDER
        """Statistics of experts for merges that need them: `statistics/EXPERT/KIND`."""
        self.indexes = root / "indexes"
        """Passages of domains that can be searched."""
        self.memories = root / "memories"
        """Datastores for the decoder `knn`, by name."""
        self.reports = root / "reports"
        self.tracking = root / ".tracking"
        """Files of experiment trackers, a folder each."""

    @classmethod
    def find(cls, start: Path | None = None) -> Layout:
        """Find the workspace at or above `start` (default: the current folder); raises `UserError` if there is none."""
        first = (start or Path.cwd()).resolve()
        for folder in (first, *first.parents):
            if (folder / CONFIG_FILE).is_file():
                return cls(folder)
        raise UserError(f"no {CONFIG_FILE} in {first} or its parents; create a workspace with `expertctl init {first}`")

    def lock(self, what: str) -> Path:
        """Return the lock file of a resource, such as `expert-law`."""
        return self.root / ".locks" / f"{what}.lock"

    def finished(self) -> Iterator[Path]:
        """Yield the folder of every finished artefact: seed, experts, baselines, generalists."""
        for folder in (self.seed, *_children(self.experts), *_children(self.baselines), *_children(self.generalists)):
            if any((folder / name).is_file() for name in MANIFEST_NAMES.values()):
                yield folder

    def finished_experts(self) -> list[str]:
        """Return the names of the finished experts, sorted."""
        return [path.name for path in _children(self.experts) if (path / MANIFEST_NAMES["expert"]).is_file()]

    def finished_memories(self) -> list[Path]:
        """Return the folders of the finished memories, sorted."""
        return [path for path in _children(self.memories) if (path / MEMORY_MANIFEST).is_file()]

    def memory(self, name: str) -> Path:
        """Return the folder of a finished memory, by name or path; raises `UserError` that lists the memories."""
        return _named(name, "memory", self.finished_memories(), MEMORY_MANIFEST)

    def finished_indexes(self) -> list[Path]:
        """Return the folders of the finished indexes, sorted."""
        return [path for path in _children(self.indexes) if (path / INDEX_MANIFEST).is_file()]

    def index(self, name: str) -> Path:
        """Return the folder of a finished index, by name or path; raises `UserError` that lists the indexes."""
        return _named(name, "index", self.finished_indexes(), INDEX_MANIFEST)

    def generalist(self, output: str | Path) -> Path:
        """Return the folder of a new generalist, by name or path; raises `UserError` for an invalid or taken name."""
        path = Path(output)
        if len(path.parts) != 1 or path.is_absolute():
            return path
        folder = self.generalists / check_name(path.name, "a generalist")
        require_free(self, path.name, folder)
        return folder

    def artefact(self, name: str) -> Path:
        """Return the folder of a finished artefact, by name or path; raises `UserError` that lists the artefacts."""
        known = {folder.name: folder for folder in self.finished()}
        if name in known:
            return known[name]
        path = Path(name).expanduser()
        if path.is_dir():
            return path.resolve()
        for parent, command in (
            (self.experts, f"`expertctl train {name}`"),
            (self.baselines, "its `expertctl baseline` command"),
            (self.generalists, f"`expertctl tune {name}`"),
        ):
            if (parent / name).is_dir():
                raise UserError(f"{parent / name} is not finished; resume it with {command}")
        raise unknown_name("model", name, known, listed_as="this workspace has")


RESERVED = ("seed", "public", "auto", "dense", "dense-same-batch", "random-split")
MAX_NAME = 180
"""Longest name; file systems allow 255 bytes, and locks and temporary folders have names derived from it."""


def require_free(layout: Layout, name: str, own: Path) -> None:
    """Raise `UserError` if an artefact other than `own` has the name, since names identify models."""
    parents = (layout.experts, layout.baselines, layout.generalists, layout.memories)
    for folder in (parent / name for parent in parents):
        if folder != own and folder.exists():
            raise UserError(f"the name '{name}' is taken by {folder}; choose another name")


def check_name(name: str, what: str) -> str:
    """Return `name` if it is valid as a folder name; raises `UserError` otherwise."""
    is_safe = name.replace("-", "").replace("_", "").replace(".", "").isalnum() and name.isascii()
    if not is_safe or name[0] in ".-" or name in RESERVED:
        raise UserError(
            f"{what} cannot be called '{name}': use letters, digits, '-', '_' and '.', starting with a letter or "
            f"digit; reserved names: {', '.join(RESERVED)}"
        )
    if len(name) > MAX_NAME:
        raise UserError(f"{what} cannot be called '{name[:40]}...': names have at most {MAX_NAME} characters")
    return name


def _named(name: str, what: str, folders: Iterable[Path], manifest: str) -> Path:
    known = {folder.name: folder for folder in folders}
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    if (path / manifest).is_file():
        return path.resolve()
    raise unknown_name(what, name, known, listed_as="this workspace has")


def _children(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
