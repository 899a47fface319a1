"""The tokenizer of a model in GGUF: tokens, merges and the rule that splits text before them.

llama.cpp does not read a rule; it has a list of rules by name, with the regular expressions in its code. So a tokenizer
is either one of those or cannot be expressed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....core.artefacts.files import read_json
from ....core.errors import UserError
from ....core.text.chat_templates import template_of
from ....core.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_RULES = {
    (("bytes", True),): {False: "gpt-2"},
    (("digits", True), ("bytes", True)): {False: "smollm"},
    (("split", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), ("bytes", False)): {False: "qwen2"},
    (("split", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), ("bytes", False)): {
        True: "llama-bpe",
        False: "dbrx",
    },
}
"""Steps of a pre-tokenizer -> whether merges are ignored for words in the vocabulary -> llama.cpp's name."""
_ROLES = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer, as GGUF writes it."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    """`gguf.TokenType` of each token."""
    merges: tuple[str, ...]
    pre: str
    special: Mapping[str, int]
    """Role (`bos` ...) -> token id."""
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None
    notes: tuple[str, ...] = ()

    def write(self, writer: GGUFWriter) -> None:
        """Write the tokenizer."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for role, number in self.special.items():
            getattr(writer, f"add_{role}_token_id")(number)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, rows: int, pre: str | None = None) -> Vocabulary:
    """Read the tokenizer of a model with `rows` token ids; raises `UserError` if GGUF or llama.cpp cannot express it."""
    path = folder / "tokenizer.json"
    content = read_json(path)
    model = content.get("model") or {}
    if reason := _refusal(model, content.get("normalizer")):
        raise UserError(f"the tokenizer {path} cannot be expressed in GGUF: {reason}")
    tokens, types = _tokens(content, rows, path)
    tokenizer = load_tokenizer(folder)
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    before, after = _added(tokenizer)
    if before not in ([], [ids["bos"]]) or after not in ([], [ids["eos"]]):
        raise UserError(
            f"the tokenizer {path} puts other tokens around a text than BOS and EOS, which GGUF cannot express"
        )
    normalizes = content.get("normalizer") is not None
    return Vocabulary(
        tokens,
        types,
        tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())),
        pre or _rule(content, path),
        {role: number for role, number in ids.items() if isinstance(number, int) and number < rows},
        adds_bos=bool(before),
        adds_eos=bool(after),
        chat_template=template_of(folder),
        notes=("llama.cpp does not normalise text (NFC) as this tokenizer does",) if normalizes else (),
    )


def _refusal(model: Mapping[str, Any], normalizer: Mapping[str, Any] | None) -> str | None:
    if model.get("type") != "BPE":
        return f"it is of type {model.get('type')}, and only byte-level BPE is supported"
    if model.get("byte_fallback"):
        return "it is a BPE over characters with byte fallback (SentencePiece), and only byte-level BPE is supported"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its tokens have a prefix or a suffix in words"
    if normalizer is not None and normalizer.get("type") != "NFC":
        return f"it normalises text by {normalizer.get('type')}"
    return None


def _tokens(content: Mapping[str, Any], rows: int, path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the token of every row of the embedding and its type; rows without a token get a name that none has."""
    from gguf import TokenType

    added = {entry["id"]: entry for entry in content.get("added_tokens") or ()}
    names = {number: token for token, number in content["model"]["vocab"].items()}
    names |= {number: entry["content"] for number, entry in added.items()}
    if max(names) >= rows:
        raise UserError(f"the tokenizer {path} has token {max(names)}, and the model only {rows} rows of embeddings")
    types = []
    for number in range(rows):
        if number not in names:
            types.append(TokenType.UNUSED)
        elif number in added:
            types.append(TokenType.CONTROL if added[number].get("special") else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    return tuple(names.get(number, f"[PAD{number}]") for number in range(rows)), tuple(map(int, types))


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after a text."""
    text = "a"
    ids, plain = tokenizer(text).input_ids, tokenizer(text, add_special_tokens=False).input_ids
    begin = next(at for at in range(len(ids)) if ids[at : at + len(plain)] == plain)
    return ids[:begin], ids[begin + len(plain) :]


def _rule(content: Mapping[str, Any], path: Path) -> str:
    """Return llama.cpp's name of a pre-tokenizer; raises `UserError` if it is none of those known here."""
    rule = content.get("pre_tokenizer") or {}
    steps = tuple(
        _step(step) for step in (rule.get("pretokenizers", ()) if rule.get("type") == "Sequence" else (rule,))
    )
    name = _RULES.get(steps, {}).get(bool(content["model"].get("ignore_merges")))
    if name is None:
        raise UserError(
            f"the tokenizer {path} splits text by a rule that is not recognised as one of llama.cpp's; if llama.cpp has it, name "
            "it: --option pre=NAME"
        )
    return name


def _step(step: Mapping[str, Any]) -> tuple[str, Any]:
    """Return a step of a pre-tokenizer without what does not change the result; itself if it is another."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes", bool(step.get("use_regex", True))
    if kind == "Digits":
        return "digits", bool(step.get("individual_digits"))
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return "split", step.get("pattern", {}).get("Regex")
    return "other", str(kind)
