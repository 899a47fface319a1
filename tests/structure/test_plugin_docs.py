"""docs/plugins.md names every hook with its exact arguments, and its code is the code that is tested."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import expertctl
from expertctl.core.hooks import hookspecs
from expertctl.core.hooks.manager import OFFER_KINDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
HOOKS = {
    name: function
    for name, function in vars(hookspecs).items()
    if inspect.isfunction(function) and function.__module__ == hookspecs.__name__
}
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def heading_of(name: str) -> str:
    return f"{name}({', '.join(inspect.signature(HOOKS[name]).parameters)})"


def test_there_are_hooks_to_look_for() -> None:
    assert {"merge_methods", "trainers", "training_step", "register_commands"} <= set(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_heading_with_its_arguments_and_an_example(name: str) -> None:
    assert heading_of(name) in SECTIONS
    body = SECTIONS[heading_of(name)]
    assert f"def {name}(" in body
    annotation = str(inspect.signature(HOOKS[name]))
    for kind in re.findall(r"[A-Z]\w+", annotation.replace("None", "").replace("click.Group", "")):
        assert f"`{kind}`" in body, f"the section does not name {kind}"


def test_no_heading_names_a_hook_that_does_not_exist() -> None:
    named = {heading for heading in SECTIONS if heading.endswith(")")}
    assert named == {heading_of(name) for name in HOOKS}


def test_the_quick_start_is_the_example_that_is_tested() -> None:
    example = ROOT / "examples" / "plugin_trimmed_mean"
    assert (example / "expertctl_trimmed_mean.py").read_text(encoding="utf-8") in BLOCKS
    assert (example / "pyproject.toml").read_text(encoding="utf-8") in PAGE


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{number}" for number in range(len(BLOCKS))])
def test_every_block_of_python_is_python_and_imports_what_exists(block: str) -> None:
    compile(block, "docs/plugins.md", "exec")
    for names in re.findall(r"^from expertctl import (.+)$", block, re.MULTILINE):
        for name in names.split(","):
            assert hasattr(expertctl, name.strip())


@pytest.mark.parametrize("name", HOOKS)
def test_every_example_registers_without_a_problem(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expertctl.core.testing import fresh_plugins

    (block,) = re.findall(r"^```python\n(.*?)^```", SECTIONS[heading_of(name)], re.MULTILINE | re.DOTALL)
    (tmp_path / f"example_of_{name}.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    manager = fresh_plugins(importlib.import_module(f"example_of_{name}"))
    if not inspect.signature(HOOKS[name]).parameters:
        (kind,) = (kind for kind, hook in OFFER_KINDS.items() if hook == name)
        assert len(manager.offers(kind)) == len(fresh_plugins().offers(kind)) + 1
    assert manager.problems == []
