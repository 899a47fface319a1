"""How the parts hang together: who may import whom, what a package is, what `import expertctl` costs."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import expertctl
from expertctl.core.hooks.manager import BUILTIN_PLUGINS

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "experts", "merge", "plugins", "cli")
PUBLIC = ROOT / "expertctl"

# A layer may import itself and those it names. The public face is the modules of `expertctl` itself.
MAY_IMPORT = {
    "core": {"core"},
    "experts": {"core", "experts"},
    "merge": {"core", "merge"},
    "plugins": {"core", "experts", "merge", "plugins"},
    "public": {"core", "experts", "merge", "plugins", "public"},
    "cli": {"core", "experts", "merge", "plugins", "public", "cli"},
}
HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "sklearn",
    "pyarrow",
    "tokenizers",
    "safetensors",
    "pandas",
    "faiss",
    "opacus",
    "rapidfuzz",
    "fsspec",
    "aiohttp",
    "huggingface_hub",
    "ray",
}


def sources() -> list[Path]:
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return sorted([*PUBLIC.glob("*.py"), *inside])


def layer_of(path: Path) -> str:
    return "public" if path.parent == PUBLIC else path.relative_to(ROOT).parts[0]


def imported_modules(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute module name) of every import in a file, wherever it stands."""
    inside = ["expertctl"] if path.parent == PUBLIC else ["expertctl", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            if module == "expertctl" or not node.module:  # `from .. import core`
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def top_level_imports(tree: ast.Module) -> Iterator[str]:
    """Yield what a module imports as soon as it is imported itself; `if TYPE_CHECKING` does not count."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module


def test_imports_point_down() -> None:
    wrong = []
    for path in sources():
        layer = layer_of(path)
        for line, module in imported_modules(path, ast.parse(path.read_text(encoding="utf-8"))):
            parts = module.split(".")
            if parts[0] != "expertctl" or len(parts) == 1:
                continue
            target = parts[1] if parts[1] in FOLDERS else "public"
            if target not in MAY_IMPORT[layer]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert wrong == []


def test_the_import_checker_sees_relative_and_absolute_imports() -> None:
    """Else the test above would pass whatever is imported."""
    source = (
        "from ..merge import engine\nfrom .. import cli\nimport expertctl.plugins.methods.btm\nfrom .errors import x\n"
    )
    modules = [module for _, module in imported_modules(ROOT / "core" / "x.py", ast.parse(source))]
    assert modules == [
        "expertctl.merge",
        "expertctl",
        "expertctl.cli",
        "expertctl.plugins.methods.btm",
        "expertctl.core.errors",
    ]


def is_plugin(path: Path) -> bool:
    """Say whether a module registers hooks; what only a plugin's work needs may import what it likes."""
    return layer_of(path) == "plugins" and "@hookimpl" in path.read_text(encoding="utf-8")


def test_commands_and_plugins_import_nothing_heavy_before_they_are_used() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources()
        if layer_of(path) in ("cli", "public") or is_plugin(path)
        for module in top_level_imports(ast.parse(path.read_text(encoding="utf-8")))
        if module.partition(".")[0] in {*HEAVY, "pydantic"}
    ]
    assert wrong == []


def test_the_package_holds_the_five_folders_under_its_own_name() -> None:
    for folder in FOLDERS:
        module = importlib.import_module(f"expertctl.{folder}")
        assert module.__name__ == f"expertctl.{folder}"
        assert (PUBLIC / folder).resolve() == ROOT / folder
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has modules and no __init__.py"


def test_the_built_in_plugins_equal_the_modules_of_their_folders() -> None:
    folder = ROOT / "plugins"
    modules = {f"{path.parent.name}.{path.stem}" for path in folder.glob("*/*.py") if path.stem != "__init__"}
    packages = {f"{path.parts[-3]}.{path.parts[-2]}" for path in folder.glob("*/*/__init__.py")}
    paths = {path for path in modules | packages if not path.startswith("flower.")} | {"flower"}
    assert list(BUILTIN_PLUGINS) == sorted(paths)


def test_the_public_face_hands_on_every_name_that_it_lists() -> None:
    tree = ast.parse((PUBLIC / "__init__.py").read_text(encoding="utf-8"))
    for_checkers = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and "expertctl" in node.module
        for alias in node.names
    }
    assert for_checkers == set(expertctl.__all__)
    assert all(getattr(expertctl, name) is not None for name in expertctl.__all__)
    assert set(expertctl.__all__) <= set(dir(expertctl))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        expertctl.nonsense  # noqa: B018  # looking it up is the test


FRESH = """
import json, sys
import expertctl
dir(expertctl), expertctl.hookimpl, expertctl.MergeMethod, expertctl.Workspace
after_import = sorted(set(sys.modules) & HEAVY)
from expertctl.core.hooks.manager import OFFER_KINDS, installed_plugins
plugins = installed_plugins()
for kind in OFFER_KINDS:
    plugins.offers(kind)
print(json.dumps([after_import, sorted(set(sys.modules) & HEAVY)]))
"""


def test_neither_the_public_face_nor_collecting_hooks_loads_anything_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FRESH.replace("HEAVY", repr(HEAVY))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], []]


def public_definitions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Yield (place, node) of a module and of its public functions and classes; hooks are documented elsewhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield str(path.relative_to(ROOT)), tree
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not any(ast.unparse(decorator).startswith("hookimpl") for decorator in node.decorator_list):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def test_every_public_function_and_class_has_a_docstring() -> None:
    missing = [
        place
        for path in sources()
        if layer_of(path) != "cli"
        for place, node in public_definitions(path)
        if not ast.get_docstring(node)
    ]
    assert missing == []


FORBIDDEN = {
    "import pickle": "nothing is unpickled",
    "torch.load(": "nothing is unpickled",
    "trust_remote_code=True": "no code of a checkpoint runs",
    "os.system(": "no shell",
    "shell=True": "no shell",
}


def test_nothing_is_unpickled_and_no_foreign_code_runs() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {text} ({why})"
        for path in sources()
        for text, why in FORBIDDEN.items()
        if text in path.read_text(encoding="utf-8")
    ]
    assert wrong == []
