"""Whether models may be merged by their licences. Help against accidents, not legal advice.

Only what contradicts itself is found: a licence that forbids derivatives, or two that each want the result for
themselves. Identifiers are those of the Hugging Face hub, in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import yaml

from ...core.artefacts.lineage import manifest_path, read_manifest
from ...core.errors import UserError

CARD = "README.md"
PERMISSIVE = frozenset(
    [
        "apache-2.0",
        "mit",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "isc",
        "zlib",
        "unlicense",
        "cc0-1.0",
        "wtfpl",
        "ncsa",
        "afl-3.0",
        "artistic-2.0",
        "ms-pl",
        "ecl-2.0",
        "bsl-1.0",
        "pddl",
        "odc-by",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "python-2.0",
        "psf-2.0",
    ]
)
NO_DERIVATIVES = frozenset(["cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"])
NON_COMMERCIAL = frozenset(
    [
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "fair-noncommercial-research-license",
        "intel-research",
        "apple-amlr",
    ]
)
KEEPS_ITSELF = frozenset(
    [
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "agpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "mpl-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "osl-3.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "odbl",
        "openrail",
        "openrail++",
        "creativeml-openrail-m",
        "bigscience-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "gemma",
        "deepfloyd-if-license",
        "grok2-community",
    ]
)
"""Licences whose terms a derived model has to keep: share-alike, copyleft, and makers' own."""
BECOMES = {
    frozenset({"gpl-3.0", "agpl-3.0"}): "agpl-3.0",
    frozenset({"lgpl-3.0", "gpl-3.0"}): "gpl-3.0",
    frozenset({"lgpl-3.0", "agpl-3.0"}): "agpl-3.0",
    frozenset({"lgpl-2.1", "gpl-2.0"}): "gpl-2.0",
    frozenset({"lgpl-2.1", "gpl-3.0"}): "gpl-3.0",
    frozenset({"mpl-2.0", "gpl-2.0"}): "gpl-2.0",
    frozenset({"mpl-2.0", "gpl-3.0"}): "gpl-3.0",
    frozenset({"mpl-2.0", "agpl-3.0"}): "agpl-3.0",
    frozenset({"mpl-2.0", "lgpl-3.0"}): "lgpl-3.0",
    frozenset({"cc-by-sa-4.0", "gpl-3.0"}): "gpl-3.0",
    frozenset({"cc-by-sa-3.0", "cc-by-sa-4.0"}): "cc-by-sa-4.0",
    frozenset({"cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"}): "cc-by-nc-sa-4.0",
}
"""Pairs that each keep themselves and still go together, and what the result is under."""
FORBIDDEN = frozenset({frozenset({"apache-2.0", "gpl-2.0"})})
"""Pairs that do not go together though only one of them keeps itself."""


@dataclass(frozen=True)
class LicenceReport:
    """How the licences of several models go together."""

    conflicts: tuple[str, ...]
    """A sentence each, naming the models; empty when nothing contradicts."""
    notes: tuple[str, ...]
    """What is not known."""
    result: str | None
    """What the merged model is under; None where it is not known."""


def check_licences(licences: Mapping[str, str | None]) -> LicenceReport:
    """Return how the licences of models (by name) go together."""
    known = {
        name: licence.strip().lower() for name, licence in licences.items() if licence and licence.strip()
    }
    conflicts = [
        f"'{name}' is under {licence}, which allows no derived models"
        for name, licence in known.items()
        if licence in NO_DERIVATIVES
    ]
    for (first, one), (second, other) in combinations(known.items(), 2):
        if _contradict(one, other):
            conflicts.append(
                f"'{first}' is under {one} and '{second}' under {other}, and a model derived from both cannot keep "
                "the terms of both"
            )
    return LicenceReport(tuple(conflicts), tuple(_notes(licences, known)), _result(licences, known))


def licence_of_folder(folder: Path) -> str | None:
    """Return the licence of a model folder: its manifest's, else that of its model card; None if neither says."""
    if manifest_path(folder) is not None:
        return read_manifest(folder).licence
    card = folder / CARD
    if not card.is_file():
        return None
    found = front_matter(card.read_text(encoding="utf-8", errors="replace")).get("license")
    return found if isinstance(found, str) else None


def front_matter(text: str) -> dict[str, object]:
    """Return the YAML head of a model card, empty where there is none that can be read."""
    if not text.startswith("---"):
        return {}
    head, _, _ = text[3:].partition("\n---")
    try:
        content = yaml.safe_load(head)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def require_compatible(report: LicenceReport, insisted: bool) -> None:
    """Raise `UserError` for the first conflict, unless the user insists."""
    if report.conflicts and not insisted:
        raise UserError(
            f"{report.conflicts[0]}; if you may merge them all the same, insist with --allow-licences"
        )


def _contradict(one: str, other: str) -> bool:
    if one == other:
        return False
    pair = frozenset({one, other})
    if pair in BECOMES:
        return False
    if pair in FORBIDDEN or (one in KEEPS_ITSELF and other in KEEPS_ITSELF):
        return True
    return any(
        first in NON_COMMERCIAL and second in KEEPS_ITSELF for first, second in ((one, other), (other, one))
    )


def _notes(licences: Mapping[str, str | None], known: Mapping[str, str]) -> list[str]:
    missing = [name for name in licences if name not in known]
    notes = [f"nothing says which licence {', '.join(missing)} is under"] if missing and known else []
    everything = PERMISSIVE | NO_DERIVATIVES | NON_COMMERCIAL | KEEPS_ITSELF
    strange = {name: licence for name, licence in known.items() if licence not in everything}
    if len(set(known.values())) > 1:
        notes += [
            f"'{name}' is under '{licence}', whose terms are not known here; read them before you share the result"
            for name, licence in strange.items()
        ]
    return notes


def _result(licences: Mapping[str, str | None], known: Mapping[str, str]) -> str | None:
    """Return the most demanding licence; models that say nothing leave the result open unless all others agree."""
    kinds = set(known.values())
    if not kinds:
        return None
    if len(kinds) == 1:
        name = next(iter(known))
        spelled = licences[name]
        return spelled.strip() if spelled is not None else None
    binding = sorted(kinds & (KEEPS_ITSELF | NON_COMMERCIAL))
    while len(binding) > 1 and frozenset(binding[:2]) in BECOMES:
        binding = sorted({BECOMES[frozenset(binding[:2])], *binding[2:]})
    if len(binding) == 1:
        return binding[0]
    return "; ".join(sorted(kinds))
