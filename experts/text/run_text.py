"""Whether a run can train on the text of its domains, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.config.phases import require_phases
from ...core.config.settings import ProjectConfig, TrainingConfig
from .corpora import domain_config, require_contents, require_text


def require_run_text(project: ProjectConfig, domains: Sequence[str], training: TrainingConfig) -> None:
    """Raise `UserError` for an unknown domain, that of the annealing included, documents that the objective cannot read, and
    stages or annealing that do not fit.
    """
    require_phases(training)
    for name in (*domains, *(training.annealing.domains if training.annealing is not None else ())):
        domain = domain_config(project, name)
        require_contents(name, domain, training)
        if training.stages:
            require_text(name, domain, "training.stages")
