"""The licence that the model card of a downloaded folder declares."""

from __future__ import annotations

from pathlib import Path

import yaml

CARD = "README.md"


def licence_on_card(folder: Path) -> str | None:
    """Return the licence in the YAML front matter of a folder's model card; None without one."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---"):
        return None
    try:
        content = yaml.safe_load(text[3:].partition("\n---")[0])
    except yaml.YAMLError:
        return None
    licence = content.get("license") if isinstance(content, dict) else None
    return licence if isinstance(licence, str) else None
