"""Every package that the code imports is declared in pyproject.toml."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"conftest"} | {
    path.stem
    for folder in ("tests/helpers", "examples", "examples/benchmarks", "examples/plugin_trimmed_mean")
    for path in (ROOT / folder).glob("*.py")
}
APART = {"trl", "datasets"}
"""Imported by a helper that runs in an environment of its own (`tests/helpers/trl_labels.py`)."""

NOT_IN_DEV = ("ray", "mlflow", "trackio", "wandb", "gcs", "s3")
"""Some have a hundred megabytes or more, and their tests are skipped without them; only fsspec imports those of object stores."""


def declared(*extras: str) -> set[str]:
    """Return the distributions of the run-time dependencies and of some extras, in lower case."""
    wanted = [*SETTINGS["dependencies"]]
    for extra in extras:
        wanted += SETTINGS["optional-dependencies"][extra]
    return {re.split(r"[<>=!\[; ]", name)[0].lower().replace("_", "-") for name in wanted}


def imported(*folders: str) -> dict[str, str]:
    """Return the top-level modules of others that the files of some folders import, with one file that does."""
    modules: dict[str, str] = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module]
                    if isinstance(node, ast.ImportFrom) and not node.level and node.module
                    else []
                )
                modules |= {name.split(".")[0]: str(path.relative_to(ROOT)) for name in names}
    own = {"expertctl", "expertctl_client", "expertctl_server", *sys.stdlib_module_names}
    return {name: place for name, place in modules.items() if name not in own}


def undeclared(modules: dict[str, str], known: set[str]) -> list[str]:
    distributions = {"mlflow": ["mlflow-skinny"], **packages_distributions()}
    return [
        f"{place} imports {name}"
        for name, place in sorted(modules.items())
        if not {distribution.lower().replace("_", "-") for distribution in distributions.get(name, [name])} & known
    ]


def test_imports_of_the_package_are_dependencies_or_extras() -> None:
    extras = [name for name in SETTINGS["optional-dependencies"] if name != "dev"]
    modules = imported("core", "experts", "merge", "plugins", "cli", "expertctl/serving", "expertctl/workspace")
    assert {"torch", "transformers", "click"} <= modules.keys()
    assert undeclared(modules, declared(*extras)) == []


def test_the_federations_own_imports_are_in_its_extra() -> None:
    modules = imported("plugins/flower", "experts/federation", "cli/federate")
    assert undeclared(modules, declared("federation", "privacy")) == []


def test_imports_of_tests_and_examples_are_in_the_development_extra() -> None:
    modules = {name: place for name, place in imported("tests", "examples").items() if name not in OURS | APART}
    assert undeclared(modules, declared("dev")) == []


def test_the_development_extra_holds_every_other_one_that_tests_need() -> None:
    others = [name for name in SETTINGS["optional-dependencies"] if name not in ("dev", *NOT_IN_DEV)]
    assert declared(*others) <= declared("dev")
