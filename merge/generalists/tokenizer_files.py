"""Writes the tokenizer files of a merged model."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...core.artefacts.digests import TOKENIZER_FILES
from ...core.artefacts.files import copy_files, read_json, write_text
from ..sources.vocabularies.model_vocabulary import TOKENIZER_FILE
from ..sources.vocabularies.row_mapping import VocabularyPlan
from ..sources.vocabularies.tokenizer_content import tokens_in_model, without_tokens

_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_IDS_FILE = "added_tokens.json"
_OLDER_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")
"""Files with the tokens of the tokenisation model, which tokenizer.json contains too."""


def write_tokenizer(plan: VocabularyPlan | None, leading: Path, output: Path) -> None:
    """Write the output's tokenizer files: byte-identical copies, except for added and removed tokens."""
    copy_files(plan.source if plan is not None else leading, output, TOKENIZER_FILES)
    if plan is None or not (plan.added or plan.removed):
        return
    source = read_json(output / TOKENIZER_FILE)
    content = without_tokens(source, plan.removed, str(plan.source)) if plan.removed else source
    content["added_tokens"] = [*(content.get("added_tokens") or []), *plan.added.values()]
    _write(output / TOKENIZER_FILE, content)
    for name in _SETTINGS_FILES:
        if (output / name).is_file():
            _change(output / name, _changed_settings(read_json(output / name), plan))
    if (output / _IDS_FILE).is_file():
        ids = {token: number for token, number in read_json(output / _IDS_FILE).items() if token not in plan.removed}
        _change(output / _IDS_FILE, ids | {token: entry["id"] for token, entry in plan.added.items()})
    if plan.removed.keys() & tokens_in_model(source).keys():
        for name in _OLDER_FILES:
            (output / name).unlink(missing_ok=True)


def without_token_ids(settings: Mapping[str, Any], removed: Collection[int]) -> dict[str, Any]:
    """Return the settings of a model or of its generation in which removed tokens are not set (`pad_token_id` ...)."""
    changed = dict(settings)
    for key, value in settings.items():
        if not key.endswith("token_id"):
            continue
        if isinstance(value, list):
            changed[key] = [number for number in value if number not in removed]
        elif value in removed:
            changed[key] = None
    return changed


def _changed_settings(settings: Mapping[str, Any], plan: VocabularyPlan) -> dict[str, Any]:
    """Return tokenizer settings without the removed tokens (as `pad_token` ...), and with the added ones."""
    changed = {
        key: [item for item in value if _token_of(item) not in plan.removed] if isinstance(value, list) else value
        for key, value in settings.items()
        if _token_of(value) not in plan.removed
    }
    if "added_tokens_decoder" in settings:
        kept = {
            number: entry
            for number, entry in settings["added_tokens_decoder"].items()
            if entry["content"] not in plan.removed
        }
        added = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in plan.added.values()
        }
        changed["added_tokens_decoder"] = kept | added
    return changed


def _token_of(setting: Any) -> str | None:
    """Return the token that a setting names, as a text or as an entry."""
    token = setting.get("content") if isinstance(setting, dict) else setting
    return token if isinstance(token, str) else None


def _change(path: Path, content: Mapping[str, Any]) -> None:
    if read_json(path) != content:
        _write(path, content)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False))
