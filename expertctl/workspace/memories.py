"""The memories of a workspace: datastores for the decoder `knn`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertctl.core.artefacts.files import exclusive, remove_tree
from expertctl.core.artefacts.layout import Layout, check_name, require_free
from expertctl.core.models.decoding.memories.manifest import MemoryManifest, read_memory
from expertctl.core.reporting import SILENT, Reporter

from .project import Project

if TYPE_CHECKING:
    from expertctl.experts.memories.settings import BuildSettings


class Memories:
    """The memories in `memories/`; `memories / "law"` is the folder of one."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self.folder = project.layout.memories

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __contains__(self, name: str) -> bool:
        return (self / name) in self._layout.finished_memories()

    @property
    def _layout(self) -> Layout:
        return self._project.layout

    def list(self) -> list[MemoryManifest]:
        """Return the manifests of all finished memories."""
        return [read_memory(folder) for folder in self._layout.finished_memories()]

    def build(
        self,
        name: str,
        domains: Sequence[str],
        model: str = "seed",
        settings: BuildSettings | None = None,
        *,
        force: bool = False,
        reporter: Reporter = SILENT,
    ) -> MemoryManifest:
        """Build a memory of the training text of domains; see `expertctl memory build`."""
        from expertctl.experts.memories.building import build_memory
        from expertctl.experts.memories.settings import BuildSettings

        return build_memory(
            self._layout,
            self._project.config,
            name,
            domains,
            model,
            settings or BuildSettings(),
            force=force,
            reporter=reporter,
        )

    def fit(
        self, name: str, domains: Sequence[str] | None = None, *, reporter: Reporter = SILENT, **settings: Any
    ) -> MemoryManifest:
        """Fit the defaults of a memory on validation text; `settings`: `k`, `tokens`. See `expertctl memory fit`."""
        from expertctl.experts.memories.building import fit_memory

        return fit_memory(self._layout, self._project.config, name, domains, reporter=reporter, **settings)

    def remove(self, name: str) -> None:
        """Remove a finished memory; raises `UserError` if another process is working on it."""
        folder = self._layout.memory(name)
        with exclusive(self._layout.lock(f"memory-{name}"), f"memory '{name}'", patience_s=0.5):
            remove_tree(folder)

    def rename(self, name: str, new_name: str) -> MemoryManifest:
        """Rename a finished memory; its files stay. Raises `UserError` for a taken name."""
        from dataclasses import replace

        folder, target = self._layout.memory(name), self / check_name(new_name, "a memory")
        require_free(self._layout, new_name, folder)
        with exclusive(self._layout.lock(f"memory-{name}"), f"memory '{name}'", patience_s=0.5):
            renamed = replace(read_memory(folder), name=new_name)
            folder.rename(target)
            renamed.write(target)
        return renamed
