"""Batch tokenisation with a checkpoint's tokenizer, and training of new tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artefacts.files import read_json, write_json, write_text
from ..artefacts.model_config import embedding_rows
from ..errors import UserError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_BATCH = 512
CHARACTERS_PER_BATCH = 4 << 20  # limits the memory of batches of long documents


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer for corpora: adds no special tokens, parses none from the text, never truncates."""

    tokenizer: Tokenizer
    separator: int
    """Id of the token that ends a document."""
    rows: int | None = None
    """Number of ids that the model can read, if the tokenizer has larger ones."""

    @classmethod
    def of_folder(cls, folder: Path) -> TextEncoder:
        """Load the tokenizer of a checkpoint folder; raises `UserError` if it has none."""
        tokenizer = _load(folder)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A document that contains the text "<|endoftext|>" must not end there.
        tokenizer.encode_special_tokens = True
        separator, rows = _separator(folder, tokenizer), embedding_rows(folder)
        encoder = cls(tokenizer, separator, rows if rows is not None and rows < _num_ids(tokenizer) else None)
        encoder.require_rows([separator])
        return encoder

    @property
    def vocabulary(self) -> int:
        """Number of token ids, including added tokens."""
        return _num_ids(self.tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; texts are encoded in parallel.

        Raises `UserError` for a token that the model has no embedding for.
        """
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        if self.rows is not None:
            for ids in rows:
                self.require_rows(ids)
        return rows

    def require_rows(self, ids: Sequence[int]) -> None:
        """Raise `UserError` for a token that the model has no embedding for."""
        if self.rows is not None and (largest := max(ids, default=0)) >= self.rows:
            raise missing_row(self.tokenizer.id_to_token(largest), largest, self.rows)

    def encode_stream(self, texts: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
        """Yield each text with its token ids, in order, one batch in memory at a time."""
        batch: list[str] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if len(batch) == DOCUMENTS_PER_BATCH or size >= CHARACTERS_PER_BATCH:
                yield from zip(batch, self.encode(batch), strict=True)
                batch, size = [], 0
        yield from zip(batch, self.encode(batch), strict=True)


def missing_row(token: str | None, token_id: int, rows: int) -> UserError:
    """Return the error for a token whose id is larger than those of the model's embedding."""
    return UserError(
        f"token {token!r} has the id {token_id}, but the model's embedding has only {rows} rows; use the tokenizer that the "
        "model was trained with, or remove the token from the text"
    )


def _num_ids(tokenizer: Tokenizer) -> int:
    """Return the largest token id plus one; ids can have gaps."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)) + 1


def _load(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{path} is damaged ({error}); download or create it again") from None
    try:  # transformers converts the formats of older folders
        loaded: Any = load_tokenizer(folder)  # only fast tokenizers have the attribute
        converted: Tokenizer = loaded.backend_tokenizer
    except AttributeError as error:
        raise UserError(f"{folder} has no loadable tokenizer ({first_line(error)}); add its tokenizer.json") from None
    return converted


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder; raises `UserError` if it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{folder} has no loadable tokenizer ({first_line(error)}); add its tokenizer.json") from None
    return tokenizer


def _separator(folder: Path, tokenizer: Tokenizer) -> int:
    """Return the id of the separator: the end-of-sequence token, otherwise the begin-of-sequence token."""
    settings, config = (
        read_json(path) if path.is_file() else {} for path in (folder / "tokenizer_config.json", folder / "config.json")
    )
    for role in ("eos_token", "bos_token"):
        token = settings.get(role)
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and (token_id := tokenizer.token_to_id(text)) is not None:
            return int(token_id)
        configured_id = config.get(f"{role}_id")
        if isinstance(configured_id, list) and configured_id:
            configured_id = configured_id[0]
        if isinstance(configured_id, int):
            return configured_id
    raise UserError(f"the tokenizer in {folder} has no end-of-sequence token; add eos_token to tokenizer_config.json")


def train_tokenizer(texts: Any, vocabulary: int, folder: Path, *, max_length: int) -> None:
    """Train a byte-level BPE tokenizer on an iterable of texts and save it as Hugging Face files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    write_json(folder / "tokenizer_config.json", settings)
