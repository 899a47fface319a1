"""Who left a generalist, joined it or was replaced, on which day: as its manifest tells."""

from __future__ import annotations

from typing import Any

from ...core.artefacts.lineage import Manifest


def history_of(manifest: Manifest) -> list[dict[str, Any]]:
    """Return `{"what", "expert", "when", "from"}` of every change, the first one first."""
    mixture = manifest.config.get("mixture") or {}
    # a generalist that was made again from its models has it beside what the merge itself says
    return [*manifest.config.get("history", ()), *mixture.get("history", ())]
