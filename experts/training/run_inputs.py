"""Inputs of a run: specification, prepared text, plugins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...core.artefacts.layout import Layout
from ...core.config.project import load_project
from ...core.hooks.manager import PluginManager, installed_plugins
from ...core.manifests.run import RunSpec, read_run
from ..text.corpora import PreparedDomain, prepare_domains


@dataclass(frozen=True)
class RunInputs:
    """Inputs of a training process."""

    folder: Path
    layout: Layout
    spec: RunSpec
    domains: tuple[PreparedDomain, ...]
    plugins: PluginManager

    @property
    def from_scratch(self) -> bool:
        return self.spec.kind == "seed"

    @property
    def base(self) -> Path:
        """Folder of the model that training starts from."""
        return base_folder(self.layout, self.spec)

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder if self.from_scratch else self.base

    @property
    def data_digests(self) -> dict[str, str]:
        """Digest of each domain's training text."""
        return {domain.name: domain.train.digest for domain in self.domains}

    @classmethod
    def of_folder(cls, folder: Path) -> RunInputs:
        """Read a run folder and prepare its domains' text; raises `UserError` if anything is missing."""
        spec = read_run(folder)
        layout = Layout.find(folder)
        project = load_project(layout.config_file)
        tokenizer = folder if spec.kind == "seed" else base_folder(layout, spec)
        domains = tuple(prepare_domains(layout, project, spec.domains, tokenizer))
        return cls(folder, layout, spec, domains, installed_plugins())


def base_folder(layout: Layout, spec: RunSpec) -> Path:
    """Return the folder of the model that a run starts from."""
    return layout.seed if spec.base in (None, "seed") else layout.artefact(spec.base)
