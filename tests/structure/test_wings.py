"""How folders are built: few rooms on a floor, and imports inside a folder that point down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("core", "experts", "merge", "plugins", "cli", "expertctl")
MOST_ROOMS = 12


def folders() -> list[Path]:
    """Return every folder with modules; the links inside `expertctl` are not followed."""
    below = [path.parent for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")]
    return sorted(path for path in set(below) if path == ROOT / "expertctl" or ROOT / "expertctl" not in path.parents)


def rooms(folder: Path) -> list[str]:
    """Return the modules and subfolders that stand in a folder."""
    modules = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    return sorted(
        [
            *modules,
            *(path.parent.name for path in folder.glob("*/__init__.py") if not path.parent.is_symlink()),
        ]
    )


def modules_below(folder: Path) -> list[Path]:
    paths = folder.glob("*.py") if folder == ROOT / "expertctl" else folder.rglob("*.py")
    return sorted(paths)


def imported_files(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield where each import of a module of ours leads: the parts of its path from the repository's root."""
    inside = path.relative_to(ROOT).parent.parts
    inside = inside[1:] if inside[0] == "expertctl" else inside
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = inside[: len(inside) - node.level + 1]
                module = (*base, *(node.module or "").split(".")) if node.module else base
            elif node.module and node.module.split(".")[0] == "expertctl":
                module = tuple(node.module.split(".")[1:])
            else:
                continue
            for alias in node.names:
                whole = (*module, alias.name)
                yield whole if is_module(whole) else module


def is_module(parts: tuple[str, ...]) -> bool:
    place = ROOT.joinpath(*parts)
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def imports_between_rooms(folder: Path) -> dict[str, set[str]]:
    """Return which rooms of a folder each of its rooms imports from, at any depth."""
    place = folder.relative_to(ROOT).parts
    place = () if place == ("expertctl",) else place
    graph: dict[str, set[str]] = {name: set() for name in rooms(folder)}
    for path in modules_below(folder):
        own = path.relative_to(folder).with_suffix("").parts[0]
        for target in imported_files(path):
            if target[: len(place)] == place and len(target) > len(place):
                other = target[len(place)]
                if own in graph and other in graph and other != own:
                    graph[own].add(other)
    return graph


@pytest.mark.parametrize("folder", folders(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_holds_at_most_a_dozen_rooms(folder: Path) -> None:
    assert len(rooms(folder)) <= MOST_ROOMS, rooms(folder)


@pytest.mark.parametrize("folder", folders(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_between_the_rooms_of_a_folder_never_form_a_circle(folder: Path) -> None:
    graph = imports_between_rooms(folder)
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"{folder.relative_to(ROOT)}: {' -> '.join(error.args[1])}")


def test_imports_inside_the_merge_package_are_seen() -> None:
    """Else the tests above would pass whatever is imported."""
    assert "planning" in imports_between_rooms(ROOT / "merge")["merging"]
    assert "errors" in imports_between_rooms(ROOT / "core")["artefacts"]


def test_every_folder_has_a_docstring() -> None:
    silent = [
        str(folder.relative_to(ROOT))
        for folder in folders()
        if not ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    ]
    assert silent == []
