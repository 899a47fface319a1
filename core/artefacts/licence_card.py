"""The metadata on the model card of a downloaded folder, such as its licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"


def licence_on_card(folder: Path) -> str | None:
    """Return the licence in the YAML front matter of a folder's model card; None without one."""
    licence = (card_metadata(folder) or {}).get("license")
    return licence if isinstance(licence, str) else None


def card_metadata(folder: Path) -> dict[str, Any] | None:
    """Return the YAML front matter of a folder's model card; None without one."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---"):
        return None
    try:
        content = yaml.safe_load(text[3:].partition("\n---")[0])
    except yaml.YAMLError:
        return None
    return content if isinstance(content, dict) else None
