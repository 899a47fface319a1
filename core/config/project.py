"""Loading of the project file `expertctl.yaml`."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from ..errors import UserError
from .discovered import discovered_domains
from .problems import first_problem
from .settings import ProjectConfig
from .yaml_lines import parse_yaml


def load_project(path: Path) -> ProjectConfig:
    """Load and validate a project file; raises `UserError` with file, line, key and the nearest valid name."""
    content, lines = parse_yaml(path)
    try:
        project = ProjectConfig.model_validate(content)
    except ValidationError as error:
        raise UserError(first_problem(error, path, lines, ProjectConfig)) from None
    discovered = discovered_domains(path.parent)
    return project.model_copy(update={"domains": {**discovered, **project.domains}}) if discovered else project
