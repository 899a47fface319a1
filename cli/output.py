"""Formatting of results: tables for terminals and pipes, JSON, short digests and counts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import click

from ..core.reporting import printable

SHORT_DIGEST = 12


@dataclass(frozen=True)
class Table:
    """A table with column headings."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    right: frozenset[int] = frozenset()
    """Indices of right-aligned (numeric) columns."""
    headings: bool = True
    strong: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of cells that are highlighted on a terminal."""


def print_json(content: Mapping[str, Any]) -> None:
    """Print the JSON object of a command.

    NaN and infinities, which JSON does not support, become null; times become ISO 8601 strings.
    """
    click.echo(json.dumps(_as_json(content), indent=2, ensure_ascii=False, allow_nan=False))


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_part(part: str | Table) -> None:
    """Print text or a table; tables are drawn by rich on a terminal and as aligned plain text elsewhere."""
    if isinstance(part, str):
        click.echo(printable(part))
    elif sys.stdout.isatty():
        _print_rich(part)
    else:
        click.echo(plain_table(part))


def plain_table(table: Table) -> str:
    """Return a table as aligned text; cells are never truncated."""
    lines = [[printable(cell) for cell in row] for row in table.rows]
    if table.headings:
        lines.insert(0, list(table.columns))
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    text = [table.title] if table.title else []
    for line in lines:
        cells = [
            cell.rjust(width) if column in table.right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def _print_rich(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    rich_table = RichTable(box=box.SIMPLE_HEAD if table.headings else None, show_header=table.headings, pad_edge=False)
    for column, heading in enumerate(table.columns):
        rich_table.add_column(
            heading, justify="right" if column in table.right else "left", overflow="fold", no_wrap=column == 0
        )
    for row, cells in enumerate(table.rows):
        styled = (
            Text(printable(cell), style="bold green" if (row, column) in table.strong else "")
            for column, cell in enumerate(cells)
        )
        rich_table.add_row(*styled)
    if table.title:
        click.secho(table.title, bold=True)
    Console().print(rich_table)


def listing(title: str, lines: Iterable[str]) -> str:
    """Return a title with indented lines below it."""
    return "\n".join([title, *(f"  {line}" for line in lines)])


def short(digest: str) -> str:
    """Return the first characters of a digest, for display."""
    return digest[:SHORT_DIGEST]


def shares(weights: Mapping[str, float], *, digits: int = 2) -> str:
    """Return named numbers on one line: `law 0.60, code 0.40`."""
    return ", ".join(f"{name} {weight:.{digits}f}" for name, weight in weights.items())


def number(value: int) -> str:
    """Return a count with thousands separators: `1,234,567`."""
    return f"{value:,}"
