"""The pages in `docs/commands` cover every command and option."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest

from expertctl.cli.main import COMMANDS, cli

PAGES = Path(__file__).parents[2] / "docs" / "commands"


def documented() -> dict[str, str]:
    """Return the section of every command by its name."""
    sections = {}
    for page in sorted(PAGES.glob("*.md")):
        for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            sections[section.partition("\n")[0].strip("`").removeprefix("expertctl ")] = section
    return sections


def commands() -> dict[str, Any]:
    context = click.Context(cli)
    by_name: dict[str, Any] = {}
    for name in (name for names in COMMANDS.values() for name in names):
        command = cli.get_command(context, name)
        if isinstance(command, click.Group):
            by_name |= {
                f"{name} {child}": command.get_command(context, child) for child in command.list_commands(context)
            }
        else:
            by_name[name] = command
    return by_name


def test_every_command_has_a_section_and_no_other_has() -> None:
    assert sorted(documented()) == sorted(commands())


@pytest.mark.parametrize("name", commands())
def test_every_option_is_explained(name: str) -> None:
    section = documented()[name]
    for option in commands()[name].params:
        if isinstance(option, click.Option):
            longest = max(option.opts, key=len)
            assert f"`{longest}" in section, longest
    assert "expertctl" in section
