"""Settings of a simulated federation: its plan, and its owners, read from a trace or drawn at random."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

from ....core.artefacts.files import os_errors_as_user_errors
from ....core.artefacts.layout import check_name
from ....core.errors import UserError, did_you_mean
from .deliveries import Delivers


@dataclass(frozen=True)
class Plan:
    """Request, coordinator and random seed of a simulated federation."""

    expert_bytes: int = 2_000_000_000
    """Size of an expert, in bytes."""
    seed_bytes: int = 2_000_000_000
    """Size of the seed, in bytes; 0 if all owners have it."""
    tokens: int = 100_000_000
    """Tokens that each owner trains on."""
    deadline: timedelta = timedelta(hours=48)
    quorum: float = 0.8
    """Share of the owners that the federation needs."""
    line_gbit: float = 10.0
    """Bandwidth of the coordinator's line in each direction, Gbit/s."""
    ask_again: int = 0
    """Times that missing owners are asked again, with the same time limit, when the deadline passes without the quorum."""
    checkpoint_seconds: float = 60.0
    """Seconds between an owner's checkpoints."""
    seed: int = 0
    """Random seed."""

    def __post_init__(self) -> None:
        if not 0 < self.quorum <= 1:
            raise UserError(f"the quorum must be a share between 0 and 1, not {self.quorum:g}")
        if min(self.tokens, self.line_gbit, self.deadline.total_seconds(), self.checkpoint_seconds) <= 0:
            raise UserError(
                "tokens, the coordinator's line, the deadline and the time between checkpoints must be more than 0"
            )
        if min(self.expert_bytes, self.seed_bytes, self.ask_again) < 0:
            raise UserError("sizes and the number of repeated requests must be 0 or more")


@dataclass(frozen=True)
class OwnerTraits:
    """One simulated owner; the field names are the columns of a trace."""

    name: str
    tokens_per_second: float
    """Training speed."""
    download_mbit: float
    """Bandwidth from the coordinator, Mbit/s."""
    upload_mbit: float
    """Bandwidth to the coordinator, Mbit/s."""
    joins_hours: float = 0.0
    """Hours from the request until the owner first connects."""
    uptime_hours: float = 0.0
    """Mean hours until the owner goes offline (exponential); 0 for never."""
    downtime_hours: float = 1.0
    """Mean hours until the owner is back (exponential)."""
    offline: tuple[tuple[float, float], ...] = ()
    """Recorded offline periods in hours, `3-5.5;20-22` in a file; they replace the two means."""
    leaves_hours: float = 0.0
    """Hours until the owner leaves for good; 0 for never."""
    delivers: Delivers = "good"
    """Kind of delivery."""

    def __post_init__(self) -> None:
        check_name(self.name, "an owner")
        for name in ("tokens_per_second", "download_mbit", "upload_mbit"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} of '{self.name}' must be more than 0")
        for name in ("joins_hours", "uptime_hours", "downtime_hours", "leaves_hours"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} of '{self.name}' must be 0 or more")
        if self.delivers not in get_args(Delivers):
            raise UserError(f"delivers of '{self.name}' is '{self.delivers}'; choose {', '.join(get_args(Delivers))}")
        ends = [0.0, *(hour for span in self.offline for hour in span)]
        if sorted(ends) != ends:
            raise UserError(f"the offline periods of '{self.name}' are not in order")


def draw_owners(count: int, seed: int, *, hostile: float = 0.02, flapping: float = 0.0) -> list[OwnerTraits]:
    """Draw random owners; a larger `count` with the same seed starts with the same owners.

    Speeds are log-normal around 4,000 tokens a second and 200 Mbit/s. 3% of the owners leave for good. A share `hostile` has
    an invalid delivery, of any kind with equal probability, and a share `flapping` loses its connection every half hour, for
    a quarter of an hour on average.
    """
    bad_deliveries = [kind for kind in get_args(Delivers) if kind != "good"]
    width = max(len(str(count - 1)), 4)
    owners = []
    for number in range(count):
        source = random.Random(f"{seed}/{number}")
        download = source.lognormvariate(0, 0.8) * 200.0
        owners.append(
            OwnerTraits(
                name=f"owner-{number:0{width}d}",
                tokens_per_second=source.lognormvariate(0, 0.8) * 4_000.0,
                download_mbit=download,
                upload_mbit=download * source.uniform(0.1, 1.0),
                joins_hours=source.expovariate(1 / 2.0),
                uptime_hours=20.0,
                downtime_hours=1.5,
                leaves_hours=source.uniform(0.1, 48) if source.random() < 0.03 else 0.0,
                delivers=source.choice(bad_deliveries) if source.random() < hostile else "good",
            )
        )
        if source.random() < flapping:
            owners[-1] = replace(owners[-1], uptime_hours=0.5, downtime_hours=0.25)
    return owners


def read_trace(path: Path) -> list[OwnerTraits]:
    """Read owners from CSV with a header row, or from JSON lines (`.jsonl`), with the fields of `OwnerTraits`.

    Raises `UserError` that names the row.
    """
    with os_errors_as_user_errors(path):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    rows: list[Any] = []
    if path.suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise UserError(f"{path}:{number} is not JSON ({error})") from None
    else:
        rows += csv.DictReader(text.splitlines())
    owners = []
    for number, row in enumerate(rows, start=1):
        try:
            owners.append(_owner(row))
        except UserError as error:
            raise UserError(f"{path}, owner {number}: {error}") from None
    if not owners:
        raise UserError(f"{path} has no owner")
    duplicates = [name for name, count in Counter(owner.name for owner in owners).items() if count > 1]
    if duplicates:
        raise UserError(f"{path} has '{duplicates[0]}' twice")
    return owners


def _owner(row: Any) -> OwnerTraits:
    """Parse one row; raises `UserError` for a column that is missing, unknown or not a number."""
    known = {field.name: field for field in fields(OwnerTraits)}
    if not isinstance(row, Mapping):
        raise UserError("a row must be a JSON object")
    values: dict[str, Any] = {}
    for name, value in row.items():
        if name not in known:
            raise UserError(f"there is no column '{name}'{did_you_mean(str(name), known)}; known: {', '.join(known)}")
        if value is not None and str(value).strip():
            values[name] = _value(name, value)
    missing = [name for name in list(known)[:4] if name not in values]
    if missing:
        raise UserError(f"the row has no {missing[0]}")
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
        expected = "periods such as 3-5.5;20-22" if name == "offline" else "a number"
        raise UserError(f"{name} is {value!r}; expected {expected}") from None
