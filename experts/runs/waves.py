"""Which experts can train now, when some start from others that are still to be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...core.config.settings import ExpertConfig
from .specification import RUN_FILE


def next_wave(pending: Sequence[str], declared: Mapping[str, ExpertConfig], experts: Path) -> list[str]:
    """Return those of `pending` that start next: from the seed or branched already, then those whose parents are done.

    `declared` are the experts of `expertctl.yaml`, where whatever is not branched below `experts` stands.
    """
    starts = {
        name: "seed" if (experts / name / RUN_FILE).is_file() else declared[name].from_ for name in pending
    }
    ready = [name for name, start in starts.items() if start == "seed"]
    if ready:
        return ready
    ready = [
        name
        for name, start in starts.items()
        if start != "auto" and not set([start] if isinstance(start, str) else start) & set(pending)
    ]
    return ready or list(pending[:1])  # `auto` one by one, so that each sees those before it
