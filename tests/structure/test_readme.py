"""What README and docs tell people to type is what there is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from expertctl.cli.main import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of every `expertctl ...` in the console blocks of a page."""
    for block in re.findall(r"```(?:console|sh|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            text = line.removeprefix("$ ").partition("  #")[0].partition(" | ")[0]
            for part in text.split("&&"):
                if part.strip().startswith("expertctl "):
                    yield shlex.split(part)[1:]


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let click parse a command line, to the last option, without running it."""
    group: click.Command = cli
    context = click.Context(cli, info_name="expertctl")
    while isinstance(group, click.Group):
        name, command, words = group.resolve_command(context, words)
        assert command is not None, name
        group, context = command, click.Context(command, info_name=name, parent=context)
    if "--help" not in words:
        # paths of an example need not exist here
        for parameter in group.params:
            if isinstance(parameter.type, click.Path):
                monkeypatch.setattr(parameter, "type", click.Path())
        group.parse_args(context, words)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_shown_is_one_that_click_takes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in command_lines(page):
        if not words[0].startswith("-"):
            parse(words, monkeypatch)


def test_there_are_commands_to_check() -> None:
    assert sum(1 for page in PAGES for _ in command_lines(page)) > 20


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = set(re.findall(r"`?make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"quickstart", "test"} <= wanted
    for target in wanted:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_continuous_integration_runs_the_tests_that_the_readme_names() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.py")), ids=lambda path: path.name)
def test_every_example_says_in_its_docstring_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if "__main__" in text:
        assert f"python {path.relative_to(ROOT).as_posix()}" in text
