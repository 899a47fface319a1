"""Help texts, command names and start-up cost."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from expertctl.cli.main import COMMANDS, cli, main

HEAVY = ("torch", "numpy", "transformers", "pydantic", "yaml", "rich", "sklearn", "tokenizers", "safetensors")


def every_command() -> list[tuple[str, ...]]:
    """Return the words of every command and subcommand."""
    context = click.Context(cli)
    commands: list[tuple[str, ...]] = []
    for name in (name for names in COMMANDS.values() for name in names):
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            commands += [(name, child) for child in command.list_commands(context)]
        else:
            commands.append((name,))
    return commands


def test_help_loads_nothing_heavy() -> None:
    script = f"""
import sys
from expertctl.cli.main import main
assert main(["--help"]) == 0
print("LOADED", [name for name in {HEAVY!r} if name in sys.modules])
"""
    run = _python(script)
    assert "LOADED []" in run.stdout, run.stdout


def test_help_lists_every_command_in_full(run: Any) -> None:
    out = run("--help").out
    for names in COMMANDS.values():
        for name in names:
            assert f"\n  {name} " in out


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_every_command_has_one_line_options_and_an_example(words: tuple[str, ...], run: Any) -> None:
    result = run(*words, "--help")
    assert result.status == 0
    lines = result.out.splitlines()
    assert lines[2].endswith("."), lines[2]
    assert lines[3] == ""
    assert "--json" in result.out
    assert "\nExample:\n  expertctl " in result.out
    example = result.out.partition("\nExample:\n")[2]
    assert example.split()[1 : 1 + len(words)] == list(words)


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_every_example_names_options_that_exist(words: tuple[str, ...]) -> None:
    context = click.Context(cli)
    command: Any = cli
    for word in words:
        command = command.get_command(context, word)
    for line in command.example.split("&&"):
        if shlex.split(line)[1 : 1 + len(words)] == list(words):
            command.make_context(words[-1], shlex.split(line)[1 + len(words) :], parent=context)


def test_version(run: Any) -> None:
    result = run("--version")
    assert (result.status, result.out.split()[0]) == (0, "expertctl")
    for words in (["--json", "--version"], ["--version", "--json"]):
        assert run(*words).json == {"version": result.out.split()[1]}


def test_no_command_shows_the_help_and_is_a_usage_error(run: Any) -> None:
    result = run()
    assert result.status == 2
    assert "Usage: expertctl" in result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mrege"], "no command 'mrege' (did you mean 'merge'?)"),
        (["data", "prepar"], "no command 'prepar' (did you mean 'prepare'?)"),
        (["zzzz"], "no command 'zzzz' (commands: init, "),
    ],
)
def test_an_unknown_command_is_a_usage_error_that_names_the_nearest(words: list[str], said: str, run: Any) -> None:
    result = run(*words)
    assert result.status == 2
    assert said in result.error


def test_module_and_entry_point_are_the_same() -> None:
    from importlib.metadata import entry_points

    (point,) = (script for script in entry_points(group="console_scripts") if script.name == "expertctl")
    assert point.load() is main


# --- third parties ---


def install(folder: Path, name: str, code: str) -> None:
    """Write a plugin's module and the metadata that an installation would leave."""
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[expertctl]\n{name} = {name}\n", encoding="utf-8")


HELLO = """
import click
from expertctl import hookimpl

@hookimpl
def register_commands(cli):
    @cli.command("hello")
    def hello():
        "Say hello."
        click.echo("hello from a plugin")
"""


def _python(script: str, *, plugins: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if plugins is not None:
        environment.pop("EXPERTCTL_PLUGINS", None)
        environment["PYTHONPATH"] = str(plugins)
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )


def _expertctl(*arguments: str, plugins: Path) -> subprocess.CompletedProcess[str]:
    script = f"import sys; from expertctl.cli.main import main; sys.exit(main({list(arguments)!r}))"
    return _python(script, plugins=plugins)


def test_a_third_party_command_is_listed_and_runs(tmp_path: Path) -> None:
    install(tmp_path, "hello_plugin", HELLO)
    assert "\nFrom plugins:\n  hello " in _expertctl("--help", plugins=tmp_path).stdout
    said = _expertctl("hello", plugins=tmp_path)
    assert (said.returncode, said.stdout) == (0, "hello from a plugin\n")


def test_a_broken_plugin_is_one_line_and_the_rest_works(tmp_path: Path) -> None:
    install(tmp_path, "broken_plugin", "import no_such_module")
    install(tmp_path, "greedy_plugin", HELLO.replace('"hello"', '"merge"'))
    listed = _expertctl("--help", plugins=tmp_path)
    assert listed.returncode == 0
    assert "Traceback" not in listed.stderr
    first, second = listed.stderr.strip().splitlines()
    assert "broken_plugin" in first
    assert "no_such_module" in first
    assert "greedy_plugin" in second
    assert "'merge' already exists" in second
    assert _expertctl("init", "--help", plugins=tmp_path).stderr == ""
    assert _expertctl("doctor", plugins=tmp_path).returncode == 1
