"""What one call of the command line knows: its options, its workspace, and where it may write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import UserError
from .output import Table, print_json, print_part

if TYPE_CHECKING:
    from expertctl.workspace import Workspace

    from ..core.artefacts.layout import Layout
    from ..core.process.progress import Count, RunProgress


class Session:
    """The options that every command takes, and what follows from them."""

    def __init__(self) -> None:
        self.workspace: Path | None = None
        self.json = False
        self.quiet = False
        self.verbose = False

    # --- what is worked on ---

    def open(self) -> Workspace:
        """Return the workspace of `--workspace`, or the one at or above the current folder."""
        from expertctl.workspace import Workspace

        return Workspace(self.workspace)

    def artefact(self, name: str) -> Path:
        """Return the folder of an artefact by its name, or by a path, which needs no workspace."""
        try:
            layout = self.open().layout
        except UserError:
            if Path(name).is_dir():
                return Path(name).resolve()
            raise
        return layout.artefact(name)

    def layout(self) -> Layout | None:
        """Return where the workspace keeps its things; None outside of one."""
        try:
            return self.open().layout
        except UserError:
            return None

    # --- what is said ---

    def note(self, text: str) -> None:
        """Say on standard error what is going on."""
        if not self.quiet:
            click.echo(text, err=True)

    def detail(self, text: str) -> None:
        """Say what only some want to know: with `--verbose`."""
        if self.verbose:
            click.echo(text, err=True)

    def finish(self, content: Mapping[str, Any], *parts: str | Table) -> None:
        """Print the result: `content` as JSON with `--json`, else the parts one below the other."""
        if self.json:
            print_json(content)
            return
        for part in parts:
            print_part(part)

    def runs(self, names: Sequence[str]) -> RunProgress:
        """Return what shows the progress of training runs."""
        from ..core.process.progress import RunProgress, display

        return RunProgress(display(quiet=self.quiet, plain=self.json), names)

    def count(self, name: str, unit: str, total: int | None = None) -> Count:
        """Return what shows the progress of counted work."""
        from ..core.process.progress import Count, display

        return Count(name, unit, total, display(quiet=self.quiet, plain=self.json))


pass_session = click.make_pass_decorator(Session, ensure=True)
