"""Order of training for experts that start from other experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...core.config.settings import ExpertConfig
from ...core.manifests.run import RUN_FILE


def next_wave(pending: Sequence[str], declared: Mapping[str, ExpertConfig], experts: Path) -> list[str]:
    """Return the pending experts to train next: first those from the seed or already branched, then their children.

    `declared` are the experts of `expertctl.yaml`, which must include those not yet branched below `experts`.
    """
    starts = {name: "seed" if (experts / name / RUN_FILE).is_file() else declared[name].from_ for name in pending}
    ready = [name for name, start in starts.items() if start == "seed"]
    if ready:
        return ready
    ready = [
        name
        for name, start in starts.items()
        if start != "auto" and not set([start] if isinstance(start, str) else start) & set(pending)
    ]
    return ready or list(pending[:1])  # `auto` one at a time: each can start from those before it
