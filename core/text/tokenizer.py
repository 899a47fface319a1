"""Batch tokenisation with a checkpoint's tokenizer, and training of new tokenizers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artefacts.files import read_json, write_json, write_text
from ..artefacts.model_config import embedding_rows
from ..errors import UserError, first_line
from .token_store import EncodedDocument

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_BATCH = 512
CHARACTERS_PER_BATCH = 4 << 20  # limits the memory of batches of long documents


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer for corpora: parses no special tokens from the text, never truncates."""

    tokenizer: Tokenizer
    separator: int
    """Id of the token that ends a document."""
    begin: tuple[int, ...] = ()
    """Ids that the tokenizer itself puts before a text, unless that is the separator, which stands there anyway."""
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
        begin = _begin(tokenizer)
        encoder = cls(
            tokenizer,
            separator,
            () if begin == (separator,) else begin,
            rows if rows is not None and rows < _num_ids(tokenizer) else None,
        )
        encoder.require_rows([separator, *begin])
        return encoder

    @property
    def vocabulary(self) -> int:
        """Number of token ids, including added tokens."""
        return _num_ids(self.tokenizer)

    @cached_property
    def begin_of_text(self) -> tuple[int, ...]:
        """Ids that the tokenizer itself puts before a text, also where that is the separator."""
        return _begin(self.tokenizer)

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

    def encode_stream(self, texts: Iterable[str], *, measure_loss: bool = False) -> Iterator[EncodedDocument]:
        """Yield the documents in order, one batch in memory at a time; `measure_loss` decodes them to count lost bytes."""
        batch: list[str] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if len(batch) == DOCUMENTS_PER_BATCH or size >= CHARACTERS_PER_BATCH:
                yield from self._encoded(batch, measure_loss)
                batch, size = [], 0
        yield from self._encoded(batch, measure_loss)

    def _encoded(self, texts: Sequence[str], measure_loss: bool) -> Iterator[EncodedDocument]:
        rows = self.encode(texts)
        lost = self.lost_bytes(texts, rows) if measure_loss and texts else [0] * len(texts)
        return map(EncodedDocument, texts, rows, lost)

    def lost_bytes(self, texts: Sequence[str], rows: Sequence[list[int]]) -> list[int]:
        """Return for each text the UTF-8 bytes of the characters that its token ids do not give back.

        A tokenizer loses characters by unknown tokens, and by changing the text (lower case, accents, white space). The
        order of characters is not compared.
        """
        decoded = self.tokenizer.decode_batch(rows, skip_special_tokens=False)
        lost = []
        for text, ids, given_back in zip(texts, rows, decoded, strict=True):
            characters = Counter(given_back)
            if self._unknown_token is not None and (count := ids.count(self._unknown_token[1])):
                characters -= Counter(self._unknown_token[0] * count)  # the name of the token is not text
            lost.append(0 if text == given_back else _size(Counter(text) - characters))
        return lost

    @cached_property
    def _unknown_token(self) -> tuple[str, int] | None:
        """The name and the id of the token for unknown text; None if the tokenizer has none."""
        model = json.loads(self.tokenizer.to_str())["model"]
        if isinstance(unknown_id := model.get("unk_id"), int):  # a Unigram model
            return str(self.tokenizer.id_to_token(unknown_id)), unknown_id
        token = model.get("unk_token")
        token_id = None if token is None else self.tokenizer.token_to_id(token)
        return None if token_id is None else (str(token), token_id)


def _size(characters: Counter[str]) -> int:
    return sum(len(character.encode("utf-8", "surrogatepass")) * count for character, count in characters.items())


def _begin(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before a text when it is called."""
    encoding = tokenizer.encode("a")
    added = takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
    return tuple(token_id for token_id, _ in added)


def set_begin(folder: Path, *, begins: bool) -> None:
    """Let the tokenizer in a folder put its BOS token before a text, or not, as its `tokenizer.json` states it.

    Raises `UserError` for a tokenizer without `tokenizer.json` or BOS token, and for one whose rule is not a template.
    """
    from tokenizers import Tokenizer, processors

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no tokenizer.json to set its BOS token in; convert the tokenizer, or leave bos out"
        )
    tokenizer = Tokenizer.from_file(str(path))
    if bool(_begin(tokenizer)) == begins:
        return
    if begins:
        token, token_id = _special_token(folder, tokenizer, "bos_token")
        if token is None or token_id is None:
            raise UserError(f"the tokenizer in {folder} has no BOS token; leave bos out")
        template = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, token_id)]
        )
        before = tokenizer.post_processor
        tokenizer.post_processor = template if before is None else processors.Sequence([before, template])
        content = tokenizer.to_str(pretty=True)
    else:
        parsed = json.loads(tokenizer.to_str())
        for node in _templates(parsed["post_processor"]):
            for form in ("single", "pair"):
                node[form] = [piece for piece in node[form] if "Sequence" in piece]
        content = json.dumps(parsed, ensure_ascii=False, indent=2)
    if bool(_begin(Tokenizer.from_str(content))) != begins:
        raise UserError(f"{path} adds tokens by a rule that is not a template; leave bos out, or edit the file")
    path.unlink()  # it may be a link to the file of another folder
    write_text(path, content)


def _templates(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the templates of a post-processor's JSON."""
    if processor is not None and processor["type"] == "TemplateProcessing":
        yield processor
    for part in (processor or {}).get("processors", ()):
        yield from _templates(part)


def add_special_tokens(folder: Path, tokens: Sequence[str]) -> int:
    """Add special tokens to the tokenizer in a folder; return the number of ids that it has then."""
    loaded: Any = load_tokenizer(folder)
    loaded.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)  # it may be a link to the file of another folder
    loaded.save_pretrained(folder)
    return _num_ids(loaded.backend_tokenizer)


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
    for role in ("eos_token", "bos_token"):
        _, token_id = _special_token(folder, tokenizer, role)
        if token_id is not None:
            return token_id
    raise UserError(f"the tokenizer in {folder} has no end-of-sequence token; add eos_token to tokenizer_config.json")


def _special_token(folder: Path, tokenizer: Tokenizer, role: str) -> tuple[str | None, int | None]:
    """Return the text and the id of a token such as `eos_token`, as the tokenizer's or else the model's settings name it."""
    settings, config = (
        read_json(path) if path.is_file() else {} for path in (folder / "tokenizer_config.json", folder / "config.json")
    )
    token = settings.get(role)
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and (token_id := tokenizer.token_to_id(text)) is not None:
        return text, int(token_id)
    configured_id = config.get(f"{role}_id")
    if isinstance(configured_id, list) and configured_id:
        configured_id = configured_id[0]
    return (tokenizer.id_to_token(configured_id), configured_id) if isinstance(configured_id, int) else (None, None)


def train_tokenizer(
    texts: Any, vocabulary: int, folder: Path, *, max_length: int, special_tokens: Sequence[str] = ()
) -> None:
    """Train a byte-level BPE tokenizer on an iterable of texts and save it as Hugging Face files.

    The vocabulary includes `<|endoftext|>` and further special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", *special_tokens],
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
