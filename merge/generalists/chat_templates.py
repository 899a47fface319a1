"""Chat templates of merged models: the models' own, one of a well-known format, or a given text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...core.artefacts.files import read_json, write_json, write_text
from ...core.text.chat_templates import AUTO, NAMED_TEMPLATES, TEMPLATE_FILE, require_chat_template, template_of

_SETTINGS_FILE = "tokenizer_config.json"


def chat_template(wanted: str, models: Sequence[Path]) -> str | None:
    """Return the template for a setting; for `auto`, the models' most common one, or None if they have none."""
    require_chat_template(wanted)
    if wanted == AUTO:
        templates = [text for text in map(template_of, models) if text is not None]
        return max(templates, key=templates.count) if templates else None
    return NAMED_TEMPLATES.get(wanted, wanted)


def write_chat_template(wanted: str, models: Sequence[Path], output: Path) -> None:
    """Write the chat template for a setting into a folder with tokenizer files, if there is one."""
    text = chat_template(wanted, models)
    if text is None:
        return
    write_text(output / TEMPLATE_FILE, text)
    settings = output / _SETTINGS_FILE
    if settings.is_file() and "chat_template" in (content := read_json(settings)):
        write_json(settings, content | {"chat_template": text})
