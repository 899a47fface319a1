"""Session of one command-line call: shared options, workspace, and output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.artefacts.layout import INDEX_MANIFEST, MEMORY_MANIFEST
from ..core.errors import UserError
from ..core.reporting import printable
from .output import Table, print_json, print_part

if TYPE_CHECKING:
    from expertctl.workspace import Workspace

    from ..core.artefacts.layout import Layout
    from ..core.process.progress import Progress

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
GATE_FAILED = 3
"""Exit status if the command succeeded and a requested check failed."""


class Session:
    """The shared options, and the workspace and output that depend on them."""

    def __init__(self) -> None:
        self.workspace: Path | None = None
        self.json = False
        self.quiet = False
        self.verbose = False

    # --- workspace ---

    def open(self) -> Workspace:
        """Return the workspace of `--workspace`, or the one at or above the current folder."""
        from expertctl.workspace import Workspace

        return Workspace(self.workspace)

    def artefact(self, name: str) -> Path:
        """Return the folder of an artefact, given by name or path; a path needs no workspace."""
        try:
            layout = self.open().layout
        except UserError:
            if Path(name).is_dir():
                return Path(name).resolve()
            raise
        return layout.artefact(name)

    def memory(self, name: str) -> Path:
        """Return the folder of a memory, given by name or path; a path needs no workspace."""
        return self._named(name, MEMORY_MANIFEST, lambda layout: layout.memory(name))

    def index(self, name: str) -> Path:
        """Return the folder of an index, given by name or path; a path needs no workspace."""
        return self._named(name, INDEX_MANIFEST, lambda layout: layout.index(name))

    def _named(self, name: str, manifest: str, find: Callable[[Layout], Path]) -> Path:
        try:
            layout = self.open().layout
        except UserError:
            if (Path(name) / manifest).is_file():
                return Path(name).resolve()
            raise
        return find(layout)

    def layout(self) -> Layout | None:
        """Return the paths of the workspace; None outside of a workspace."""
        try:
            return self.open().layout
        except UserError:
            return None

    # --- output ---

    def note(self, text: str) -> None:
        """Print a note on standard error, unless `--quiet` is set."""
        if not self.quiet:
            click.echo(printable(text), err=True)

    def finish(self, content: Mapping[str, Any], *parts: str | Table) -> None:
        """Print the result: `content` as JSON with `--json`, else the parts one after the other."""
        if self.json:
            print_json(content)
            return
        for part in parts:
            print_part(part)

    def progress(self, *expected: str) -> Progress:
        """Return the progress display of this call; `expected` are the names of the known jobs, such as experts."""
        from ..core.process.progress import Progress, display

        return Progress(display(quiet=self.quiet, plain=self.json), expected)


pass_session = click.make_pass_decorator(Session, ensure=True)
