"""What owners are like: read from a trace, or drawn at random."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from ....core.artefacts.files import readable_os_errors
from ....core.artefacts.layout import check_name
from ....core.errors import UserError, closest
from .deliveries import Delivers


@dataclass(frozen=True)
class OwnerTraits:
    """One owner: a row of a trace, whose columns have these names."""

    name: str
    tokens_per_second: float
    """Speed of its training."""
    download_mbit: float
    """Mbit/s from the coordinator."""
    upload_mbit: float
    """Mbit/s to the coordinator."""
    joins_hours: float = 0.0
    """Hours after the request was made when it first asks for it."""
    uptime_hours: float = 0.0
    """Mean hours until it drops out (exponential); 0: never."""
    downtime_hours: float = 1.0
    """Mean hours until it is back (exponential)."""
    offline: tuple[tuple[float, float], ...] = ()
    """Hours in which it was away, `3-5.5;20-22` in a file: a record, in place of the two means."""
    leaves_hours: float = 0.0
    """Hours after which it is gone for good; 0: never."""
    delivers: Delivers = "good"
    """What it hands in."""

    def __post_init__(self) -> None:
        check_name(self.name, "an owner")
        for name in ("tokens_per_second", "download_mbit", "upload_mbit"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} of '{self.name}' has to be more than 0")
        for name in ("joins_hours", "uptime_hours", "downtime_hours", "leaves_hours"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} of '{self.name}' has to be 0 or more")
        if self.delivers not in get_args(Delivers):
            raise UserError(
                f"'{self.name}' delivers '{self.delivers}'; it can be {', '.join(get_args(Delivers))}"
            )
        ends = [0.0, *(hour for span in self.offline for hour in span)]
        if sorted(ends) != ends:
            raise UserError(f"the hours in which '{self.name}' was offline do not follow each other")


@dataclass(frozen=True)
class Population:
    """How owners are drawn where there is no trace. Speeds are log-normal: a median, and the spread of the logarithm."""

    tokens_per_second: tuple[float, float] = (4_000.0, 0.8)
    download_mbit: tuple[float, float] = (200.0, 0.8)
    upload_share: tuple[float, float] = (0.1, 1.0)
    """An upload's speed as a share of the download's: least and most, even between them."""
    joins_hours: float = 2.0
    """Mean (exponential)."""
    uptime_hours: float = 20.0
    downtime_hours: float = 1.5
    leaving: float = 0.03
    """Share of owners who go for good, at a time even over their first two days."""
    bad: float = 0.02
    """Share of owners who hand in what must not be taken, of every kind alike."""


def drawn_owners(count: int, seed: int, population: Population | None = None) -> list[OwnerTraits]:
    """Draw owners; the same seed gives the same ones, and more of them begin with the same."""
    chosen = population or Population()
    bad = [kind for kind in get_args(Delivers) if kind != "good"]
    width = max(len(str(count - 1)), 4)
    found = []
    for number in range(count):
        source = random.Random(f"{seed}/{number}")
        download = source.lognormvariate(0, chosen.download_mbit[1]) * chosen.download_mbit[0]
        found.append(
            OwnerTraits(
                name=f"owner-{number:0{width}d}",
                tokens_per_second=source.lognormvariate(0, chosen.tokens_per_second[1])
                * chosen.tokens_per_second[0],
                download_mbit=download,
                upload_mbit=download * source.uniform(*chosen.upload_share),
                joins_hours=source.expovariate(1 / chosen.joins_hours),
                uptime_hours=chosen.uptime_hours,
                downtime_hours=chosen.downtime_hours,
                leaves_hours=source.uniform(0.1, 48) if source.random() < chosen.leaving else 0.0,
                delivers=source.choice(bad) if source.random() < chosen.bad else "good",
            )
        )
    return found


def read_trace(path: Path) -> list[OwnerTraits]:
    """Read a row for each owner: CSV with a heading, or JSON lines (`.jsonl`), columns as in `OwnerTraits`.

    Raises `UserError` that names the row.
    """
    with readable_os_errors(path):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    rows: Iterable[Any]
    if path.suffix in (".jsonl", ".ndjson"):
        rows = [
            _json_row(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()
        ]
    else:
        rows = list(csv.DictReader(text.splitlines()))
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(_owner(row))
        except UserError as error:
            raise UserError(f"{path}, owner {number}: {error}") from None
    if not found:
        raise UserError(f"{path} has no owner")
    names = [owner.name for owner in found]
    twice = (
        next((name for name in names if names.count(name) > 1), None)
        if len(set(names)) < len(names)
        else None
    )
    if twice is not None:
        raise UserError(f"{path} has '{twice}' twice")
    return found


def _json_row(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number} is no JSON ({error})") from None


def _owner(row: Any) -> OwnerTraits:
    """Return the owner of one row; raises `UserError` for a column that is missing, unknown or no number."""
    known = {field.name: field for field in fields(OwnerTraits)}
    if not isinstance(row, Mapping):
        raise UserError("a row has to be a JSON object")
    values: dict[str, Any] = {}
    for name, value in row.items():
        if name not in known:
            guess = closest(str(name), known)
            hint = f" (did you mean '{guess}'?)" if guess else ""
            raise UserError(f"there is no column '{name}'{hint}; known: {', '.join(known)}")
        if value is not None and str(value).strip():
            values[name] = _value(name, value)
    missing = [name for name in list(known)[:4] if name not in values]
    if missing:
        raise UserError(f"it has no {missing[0]}")
    return OwnerTraits(**values)


def _value(name: str, value: Any) -> Any:
    if name in ("name", "delivers"):
        return str(value).strip()
    try:
        if name != "offline":
            return float(value)
        spans = value if isinstance(value, list) else [part.split("-") for part in str(value).split(";")]
        return tuple((float(begin), float(end)) for begin, end in spans)
    except (ValueError, TypeError):
        form = "such as 3-5.5;20-22" if name == "offline" else "a number"
        raise UserError(f"{name} is {value!r}, and should be {form}") from None
