"""Commands and groups of the command line: loaded when they are needed, with the same options everywhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..core.errors import closest
from .context import Session

Callback = Callable[..., int | None]


class Command(click.Command):
    """A command that also takes the options of `expertctl` itself and shows an example in its help."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        self._everywhere = options_everywhere()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *self._everywhere]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = [param for param in super().get_params(ctx) if isinstance(param, click.Option)]
        for title, options in (("Options", own), ("Options of every command", self._everywhere)):
            if records := [record for option in options if (record := option.get_help_record(ctx))]:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.example:
            with formatter.section("Example"):
                for line in self.example.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Group(click.Group):
    """A group of commands that names the nearest one when a name is unknown."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None and not ctx.resilient_parsing:
            guess = closest(name, self.list_commands(ctx))
            hint = f"did you mean '{guess}'?" if guess else f"commands: {', '.join(self.list_commands(ctx))}"
            ctx.fail(f"no command '{name}' ({hint})")
        return super().resolve_command(ctx, args)


class LazyGroup(Group):
    """The root: each command of ours is a module that is imported when the command is named.

    Third-party commands come from the `register_commands` hook; plugins are loaded for it only when help is
    listed, or when a name is none of ours.
    """

    def __init__(self, *args: Any, modules: Mapping[str, Sequence[str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sections = dict(modules or {})
        self._own = tuple(name for names in self._sections.values() for name in names)
        self._asked_plugins = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._ask_plugins()
        return [*self._own, *sorted(self.commands)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in self._own:
            return _load(self._folder_of(name), name)
        self._ask_plugins()
        return self.commands.get(name)

    def _folder_of(self, name: str) -> str:
        """Return the folder of a command's module: its section, in lower case."""
        return next(section.lower() for section, names in self._sections.items() if name in names)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        taken = name or cmd.name
        if taken in self._own or taken in self.commands:
            raise ValueError(f"the command '{taken}' exists already")
        super().add_command(cmd, name)

    def _ask_plugins(self) -> None:
        if self._asked_plugins:
            return
        self._asked_plugins = True
        from importlib.metadata import entry_points

        if entry_points(group="expertctl"):  # else help need not pay for loading the built-in plugins
            from ..core.hooks.manager import installed_plugins

            installed_plugins().register_commands(self)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands in the order in which a project meets them."""
        names = self.list_commands(ctx)
        width = max(len(name) for name in names)
        limit = formatter.width - width - 6
        own = dict(self._sections)
        if self.commands:
            own["From plugins"] = sorted(self.commands)
        for title, section in own.items():
            found = ((name, self.get_command(ctx, name)) for name in section)
            rows = [
                (name.ljust(width), found.get_short_help_str(limit))
                for name, found in found
                if found is not None and not found.hidden
            ]
            with formatter.section(title):
                formatter.write_dl(rows)


def _load(folder: str, name: str) -> click.Command:
    """Import the module of one command, `cli/FOLDER/NAME.py`, and return its `command`."""
    module = importlib.import_module(f".{folder}.{name.replace('-', '_')}", __package__)
    command: click.Command = module.command
    return command


def cli_command(name: str, *, example: str) -> Callable[[Callback], Command]:
    """Return the decorator of a command function; its help is the function's docstring."""
    return click.command(name, cls=Command, example=example)


def options_everywhere() -> list[click.Option]:
    """Return the options that stand before the command or after it, whichever comes to mind."""
    return [
        click.Option(
            ["-w", "--workspace"],
            type=click.Path(path_type=Path),
            metavar="DIR",
            callback=_note,
            expose_value=False,
            help="The project's folder. Default: the one at or above the current folder.",
        ),
        _flag(["--json"], "Print one JSON object on standard output, everything else on standard error."),
        _flag(["-q", "--quiet"], "No notes and no progress."),
        _flag(["-v", "--verbose"], "More notes, and where in the code an error arose."),
    ]


def _flag(names: list[str], text: str) -> click.Option:
    return click.Option(names, is_flag=True, callback=_note, expose_value=False, is_eager=True, help=text)


def _note(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep the value of a shared option in the session, wherever on the line it stood."""
    session = ctx.ensure_object(Session)
    if value:
        assert param.name is not None
        setattr(session, param.name, value)
        if session.quiet and session.verbose:
            raise click.UsageError("--quiet and --verbose contradict each other", ctx)
