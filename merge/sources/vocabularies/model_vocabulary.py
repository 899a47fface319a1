"""The vocabulary of one model: the tokens of its tokenizer that have embedding rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ....core.artefacts.digests import TOKENIZER_FILES
from ....core.artefacts.files import read_json
from ....core.errors import UserError, did_you_mean
from .tokenizer_content import added_tokens, token_ids, without_tokens

TOKENIZER_FILE = "tokenizer.json"
_PARTS = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
_OLDER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_EXAMPLES = 3


@dataclass(frozen=True)
class ModelVocabulary:
    """Tokenizer and embedding size of one model."""

    name: str
    folder: Path
    rows: int
    """Number of embedding rows; larger than the number of tokens if padded, 0 if unknown."""

    @cached_property
    def declared(self) -> dict[str, Any] | None:
        """Content of tokenizer.json; None if the folder has none."""
        path = self.folder / TOKENIZER_FILE
        return read_json(path) if path.is_file() else None

    @cached_property
    def without_row(self) -> dict[str, int]:
        """Tokens that the tokenizer declares, but that have no embedding row -> token id."""
        if self.declared is None or not self.rows:
            return {}
        return {token: number for token, number in token_ids(self.declared).items() if number >= self.rows}

    @cached_property
    def content(self) -> dict[str, Any] | None:
        """Content of tokenizer.json, without tokens that have no embedding row; None without tokenizer.json."""
        if self.declared is None or not self.without_row:
            return self.declared
        return without_tokens(self.declared, self.without_row, f"'{self.name}' ({self.folder})")

    @cached_property
    def added(self) -> dict[str, dict[str, Any]]:
        """Added tokens with an embedding row -> entry in tokenizer.json."""
        return added_tokens(self.content or {})

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Tokens with an embedding row -> token id; raises `UserError` without tokenizer.json."""
        if self.content is None:
            raise UserError(
                f"{self.folder} has no {TOKENIZER_FILE}, which is needed to compare tokenizers; write it with "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        return token_ids(self.content)

    @property
    def num_tokens(self) -> int:
        """One more than the largest token id."""
        return max(self.tokens.values(), default=-1) + 1

    def has(self, token: str) -> bool:
        """Return whether the model has an embedding row for a token."""
        return self.content is not None and token in self.tokens

    def row_of(self, token: str | int) -> int:
        """Return the embedding row of a token or token id; raises `UserError` if the model has none."""
        if isinstance(token, int):
            if not 0 <= token < self.rows:
                raise UserError(f"'{self.name}' has no token id {token}; it has {self.rows:,} embedding rows")
            return token
        if token not in self.tokens:
            reason = " with an embedding row" if token in self.without_row else did_you_mean(token, self.tokens)
            raise UserError(f"'{self.name}' has no token '{token}'{reason}")
        return self.tokens[token]

    def is_equivalent(self, other: ModelVocabulary) -> bool:
        """Return whether two models have equivalent tokenizers and the same number of embedding rows."""
        if self.rows != other.rows:
            return False
        if self.declared is not None and other.declared is not None:
            return _parts(self.declared) == _parts(other.declared)
        for folder in (self.folder, other.folder):
            if not any((folder / name).is_file() for name in TOKENIZER_FILES):
                return True  # without tokenizer files, the tokenizer of the other model applies
        return _older_files(self.folder) == _older_files(other.folder)

    def note_on_rows(self) -> str | None:
        """Return the note for the user about tokens without an embedding row; None if there are none."""
        if not self.without_row:
            return None
        examples = ", ".join(f"'{token}'" for token in list(self.without_row)[:_EXAMPLES])
        more = "" if len(self.without_row) <= _EXAMPLES else " ..."
        return (
            f"tokens of '{self.name}' without an embedding row are left out: {len(self.without_row)} with ids from "
            f"{self.rows} ({examples}{more})"
        )


def _parts(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a tokenizer.json that determine token ids."""
    return {part: content.get(part) for part in _PARTS}


def _older_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in _OLDER_FILES if (folder / name).is_file()}
