"""Inputs of a run: specification, project, prepared text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ...core.artefacts.layout import Layout
from ...core.config.project import load_project
from ...core.config.settings import ProjectConfig
from ...core.manifests.manifest import read_manifest
from ...core.manifests.run import RUN_FILE, RunSpec, read_run
from ..text.corpora import PreparedDomain, domain_config, prepare_domain


@dataclass(frozen=True)
class RunInputs:
    """Inputs of a training process."""

    folder: Path
    layout: Layout
    project: ProjectConfig
    spec: RunSpec
    base: Path
    """Folder of the model that training starts from."""
    tokenizer_folder: Path
    domains: tuple[PreparedDomain, ...]
    annealing: tuple[PreparedDomain, ...] = ()
    """Domains of the annealing, which may be among `domains`."""

    @property
    def all_domains(self) -> tuple[PreparedDomain, ...]:
        """The run's domains, and behind them those that only its annealing has."""
        names = {domain.name for domain in self.domains}
        return (*self.domains, *(domain for domain in self.annealing if domain.name not in names))

    @property
    def data_digests(self) -> dict[str, str]:
        """Digest of each domain's training text, that of the annealing included."""
        return {domain.name: domain.train.digest for domain in self.all_domains}

    @property
    def digest(self) -> str:
        """Digest (sha256) of what all processes of a run must have in common: settings, text, base and torch's version."""
        import torch

        base = read_manifest(self.base).digest if self.spec.kind != "seed" else ""
        content = [(self.folder / RUN_FILE).read_text(encoding="utf-8"), self.data_digests, base, torch.__version__]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def of_folder(cls, folder: Path) -> RunInputs:
        """Read a run folder and prepare its domains' text; raises `UserError` if anything is missing."""
        spec = read_run(folder)
        layout = Layout.find(folder)
        project = load_project(layout.config_file)
        base = layout.seed if spec.base in (None, "seed") else layout.artefact(spec.base)
        tokenizer = folder if spec.kind == "seed" else base
        annealing = spec.training.annealing.domains if spec.training.annealing is not None else ()
        domains, annealed = (
            tuple(prepare_domain(layout, name, domain_config(project, name), tokenizer) for name in names)
            for names in (spec.domains, annealing)
        )
        return cls(folder, layout, project, spec, base, tokenizer, domains, annealed)
