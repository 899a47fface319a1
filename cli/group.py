"""Click commands and groups of the command line: imported lazily, with shared options."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..core.errors import did_you_mean
from .context import Session

Callback = Callable[..., int | None]


class Command(click.Command):
    """A command with the shared options and an example in its help."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        self._everywhere = options_everywhere()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *self._everywhere]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own_options = [param for param in super().get_params(ctx) if isinstance(param, click.Option)]
        for title, options in (("Options", own_options), ("Options of every command", self._everywhere)):
            if records := [record for option in options if (record := option.get_help_record(ctx))]:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.example:
            with formatter.section("Example"):
                for line in self.example.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Group(click.Group):
    """A command group that suggests the closest name for an unknown command."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None and not ctx.resilient_parsing:
            commands = self.list_commands(ctx)
            hint = did_you_mean(name, commands, f" (commands: {', '.join(commands)})")
            ctx.fail(f"no command '{name}'{hint}")
        return super().resolve_command(ctx, args)


class LazyGroup(Group):
    """The root group, which imports the module of a built-in command when that command is used.

    Third-party commands come from the `register_commands` hook. Plugins are loaded for it only to list the commands
    in the help, or if a name is not a built-in command.
    """

    def __init__(self, *args: Any, modules: Mapping[str, Sequence[str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sections = dict(modules or {})
        self._folders = {name: section.lower() for section, names in self._sections.items() for name in names}
        """Folder of each built-in command's module: its section in lower case."""
        self._plugins_loaded = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._load_plugins()
        return [*self._folders, *sorted(self.commands)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in self._folders:
            module = importlib.import_module(f".{self._folders[name]}.{name.replace('-', '_')}", __package__)
            command: click.Command = module.command
            return command
        self._load_plugins()
        return self.commands.get(name)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        new_name = name or cmd.name
        if new_name in self._folders or new_name in self.commands:
            raise ValueError(f"the command '{new_name}' already exists")
        super().add_command(cmd, name)

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        from importlib.metadata import entry_points

        if entry_points(group="expertctl"):  # without third parties, help need not load the built-in plugins
            from ..core.hooks.manager import installed_plugins

            installed_plugins().register_commands(self)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section, in the order of a project's workflow."""
        names = self.list_commands(ctx)
        width = max(len(name) for name in names)
        limit = formatter.width - width - 6
        sections = dict(self._sections)
        if self.commands:
            sections["From plugins"] = sorted(self.commands)
        for title, section in sections.items():
            commands = ((name, self.get_command(ctx, name)) for name in section)
            rows = [
                (name.ljust(width), command.get_short_help_str(limit))
                for name, command in commands
                if command is not None and not command.hidden
            ]
            with formatter.section(title):
                formatter.write_dl(rows)


def cli_command(name: str, *, example: str) -> Callable[[Callback], Command]:
    """Return a decorator that makes a function a command, with the function's docstring as its help."""
    return click.command(name, cls=Command, example=example)


def options_everywhere() -> list[click.Option]:
    """Return the options that are accepted before and after every command."""
    return [
        click.Option(
            ["-w", "--workspace"],
            type=click.Path(path_type=Path),
            metavar="DIR",
            callback=_store,
            expose_value=False,
            help="Workspace folder. Default: the current folder or the nearest parent with an expertctl.yaml.",
        ),
        _flag(["--json"], "Print one JSON object on standard output and everything else on standard error."),
        _flag(["-q", "--quiet"], "Print no notes and no progress."),
        _flag(["-v", "--verbose"], "Print more notes, and the traceback of an error."),
    ]


def _flag(names: list[str], text: str) -> click.Option:
    return click.Option(names, is_flag=True, callback=_store, expose_value=False, is_eager=True, help=text)


def _store(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Store the value of a shared option in the session, wherever it stands on the command line."""
    session = ctx.ensure_object(Session)
    if value:
        assert param.name is not None
        setattr(session, param.name, value)
        if session.quiet and session.verbose:
            raise click.UsageError("--quiet and --verbose exclude each other", ctx)
