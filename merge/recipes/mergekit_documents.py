"""Reads mergekit-multi files: several merges, one in each YAML document, that take results of each other as inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.artefacts.layout import check_name
from ...core.config.yaml_lines import KeyPath, parse_documents
from ...core.errors import UserError
from .mergekit_file import recipe_of
from .mergekit_models import NamedModels
from .places import placed
from .recipe import Recipe

FINAL = "final"
"""Name of the merge whose document has no name."""


@dataclass(frozen=True)
class Stage:
    """One merge of a file."""

    name: str
    recipe: Recipe
    folder: Path
    """Output folder."""
    needs: tuple[str, ...] = ()
    """Stages whose results are among the inputs."""
    place: str = ""
    """`FILE:LINE` of the document."""


def read_stages(path: Path, output: Path) -> tuple[Stage, ...]:
    """Return the merges of a file, each after those that it needs.

    The output of a file with one document is `output`; with several documents, the output of each is a folder in `output`
    with the name of the document, `final` for the one without. Raises `UserError` with file and line for unsupported
    documents, duplicate names, and merges that need each other.
    """
    documents = parse_documents(path)
    if len(documents) <= 1:
        content, lines = documents[0] if documents else ({}, {})
        return (Stage(output.name, recipe_of(content, NamedModels(path, lines)), output),)
    names = _names(documents, path)
    folders = {name: output / name for name, (content, _) in zip(names, documents, strict=True) if "name" in content}
    stages = []
    for name, (content, lines) in zip(names, documents, strict=True):
        named = NamedModels(path, lines, folders)
        recipe = recipe_of(content, named)
        stages.append(Stage(name, recipe, output / name, tuple(sorted(named.used_stages)), named.at()))
    return _in_order(stages)


def _names(documents: Sequence[tuple[Any, Mapping[KeyPath, int]]], path: Path) -> list[str]:
    """Return the name of each document's result; raises `UserError` for invalid names and duplicates."""
    names: list[str] = []
    for content, lines in documents:
        with placed(f"{path}:{lines.get(('name',), lines[()])}"):
            if not isinstance(content, dict):
                raise UserError("a document is a mapping of keys to values")
            name = content.get("name", FINAL)
            if not isinstance(name, str):
                raise UserError(f"'name' must be a text (it is {name!r})")
            if check_name(name, "a merge") in names:
                raise UserError(
                    f"two merges are called '{name}', which is also the name of a document without a name; rename one"
                    if name == FINAL
                    else f"two merges are called '{name}'; rename one"
                )
            names.append(name)
    return names


def _in_order(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages, each after those that it needs and otherwise in the order of the file."""
    ordered: list[Stage] = []
    waiting = list(stages)
    while waiting:
        done = {stage.name for stage in ordered}
        ready = next((stage for stage in waiting if done.issuperset(stage.needs)), None)
        if ready is None:
            names = ", ".join(f"'{stage.name}'" for stage in waiting)
            raise UserError(
                f"{waiting[0].place}: the merges {names} wait for the results of each other; remove one reference"
            )
        waiting.remove(ready)
        ordered.append(ready)
    return tuple(ordered)
