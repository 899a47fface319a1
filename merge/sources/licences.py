"""Checks whether the licences of models allow a merge. A safeguard against mistakes, not legal advice.

Finds only contradictions: licences that forbid derivatives, and pairs of licences that each require the result to be
under their own terms. Identifiers are those of the Hugging Face hub, case-insensitive.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import yaml

from ...core.errors import UserError


@dataclass(frozen=True)
class LicenceTable:
    """Known licences and how they combine; `licences.yaml` beside this file."""

    permissive: frozenset[str]
    no_derivatives: frozenset[str]
    non_commercial: frozenset[str]
    copyleft: frozenset[str]
    """Licences whose terms a derived model has to keep: copyleft, share-alike, and model makers' own."""
    combines_into: Mapping[frozenset[str], str]
    """Pairs of copyleft licences that can be combined, and the licence of the result."""
    incompatible: frozenset[frozenset[str]]
    """Pairs that cannot be combined although only one of them is copyleft."""


@functools.cache
def licence_table() -> LicenceTable:
    """Return the table of known licences."""
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    names = ("permissive", "no_derivatives", "non_commercial", "copyleft")
    return LicenceTable(
        **{name: frozenset(content[name]) for name in names},
        combines_into={frozenset(entry["pair"]): entry["result"] for entry in content["combines_into"]},
        incompatible=frozenset(frozenset(pair) for pair in content["incompatible"]),
    )


@dataclass(frozen=True)
class LicenceReport:
    """Compatibility of the licences of several models."""

    conflicts: tuple[str, ...]
    """One sentence per conflict, with the names of the models."""
    notes: tuple[str, ...]
    """Missing and unknown licences."""
    result: str | None
    """Licence of the merged model, whatever the conflicts; None if that of any model is unknown."""

    @property
    def agreed(self) -> str | None:
        """Licence of the merged model; None if it is unknown or licences are incompatible."""
        return None if self.conflicts else self.result

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self.conflicts, *self.notes)


def check_licences(licences: Mapping[str, str | None]) -> LicenceReport:
    """Return the compatibility of the licences of models (by name)."""
    known = {name: licence.strip().lower() for name, licence in licences.items() if licence and licence.strip()}
    table = licence_table()
    conflicts = [
        f"'{name}' is under {licence}, which forbids derived models"
        for name, licence in known.items()
        if licence in table.no_derivatives
    ]
    conflicts += [
        f"'{first}' is under {first_licence} and '{second}' under {second_licence}, and a derived model cannot comply with both"
        for (first, first_licence), (second, second_licence) in combinations(known.items(), 2)
        if _is_conflict(first_licence, second_licence)
    ]
    return LicenceReport(tuple(conflicts), tuple(_notes(licences, known)), _result(licences, known))


def require_compatible(report: LicenceReport, allow_conflicts: bool) -> LicenceReport:
    """Return the report; raises `UserError` for its first conflict, unless `allow_conflicts` is set."""
    if report.conflicts and not allow_conflicts:
        raise UserError(f"{report.conflicts[0]}; if you have permission to merge them, use --allow-licences")
    return report


def _is_conflict(first: str, second: str) -> bool:
    table, pair = licence_table(), frozenset({first, second})
    if first == second or pair in table.combines_into:
        return False
    if pair in table.incompatible or pair <= table.copyleft:
        return True
    return any(
        restricted in table.non_commercial and other in table.copyleft
        for restricted, other in ((first, second), (second, first))
    )


def _notes(licences: Mapping[str, str | None], known: Mapping[str, str]) -> list[str]:
    missing = [name for name in licences if name not in known]
    unknown = f"no licence is recorded for {', '.join(missing)}, so that of the result is unknown"
    notes = [unknown] if missing and known else []
    table = licence_table()
    all_known = table.permissive | table.no_derivatives | table.non_commercial | table.copyleft
    if len(set(known.values())) > 1:
        notes += [
            f"'{name}' is under '{licence}', whose terms expertctl does not know; read them before you share the result"
            for name, licence in known.items()
            if licence not in all_known
        ]
    return notes


def _result(licences: Mapping[str, str | None], known: Mapping[str, str]) -> str | None:
    """Return the licence of the result: the most restrictive one, or all licences if they cannot be combined."""
    distinct = set(known.values())
    if not distinct or len(known) < len(licences):
        return None
    if len(distinct) == 1:
        return (licences[next(iter(known))] or "").strip()  # in its original spelling
    table = licence_table()
    binding = sorted(distinct & (table.copyleft | table.non_commercial))
    while len(binding) > 1 and frozenset(binding[:2]) in table.combines_into:
        binding = sorted({table.combines_into[frozenset(binding[:2])], *binding[2:]})
    return binding[0] if len(binding) == 1 else "; ".join(sorted(distinct))
