"""Tokens in the content of a tokenizer.json: listing and removing them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ....core.errors import UserError


def tokens_in_model(content: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens of the tokenisation model, without added tokens -> token id."""
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: a list of (token, score)
        return {pair[0]: number for number, pair in enumerate(vocabulary)}
    return dict(vocabulary)


def added_tokens(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return added tokens -> entry."""
    return {entry["content"]: entry for entry in content.get("added_tokens") or []}


def token_ids(content: Mapping[str, Any]) -> dict[str, int]:
    """Return all tokens -> token id."""
    return {**tokens_in_model(content), **{token: entry["id"] for token, entry in added_tokens(content).items()}}


def without_tokens(content: Mapping[str, Any], removed: Collection[str], where: str) -> dict[str, Any]:
    """Return the content without the tokens `removed`, which have the largest ids, and without merges of them.

    Raises `UserError` that names the tokenizer (`where`) if it adds one of them to every text.
    """
    model = dict(content.get("model") or {})
    for token in (model.get("unk_token"), *_inserted_tokens(content.get("post_processor"))):
        if token in removed:
            raise UserError(
                f"the tokenizer of {where} needs the token '{token}', which has no embedding row; give the model more rows "
                "(resize_token_embeddings), or choose another tokenizer"
            )
    if "vocab" in model:
        model["vocab"] = _kept_vocabulary(model["vocab"], removed)
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _uses(merge, removed)]
    changed = {**content, "model": model}
    if "added_tokens" in content:
        kept = [entry for entry in content["added_tokens"] or [] if entry["content"] not in removed]
        changed["added_tokens"] = kept
    padding = content.get("padding")
    if isinstance(padding, dict) and padding.get("pad_token") in removed:
        changed["padding"] = None
    return changed


def _inserted_tokens(post_processor: Any) -> list[str]:
    """Return the tokens that a post-processor inserts into texts."""
    if not isinstance(post_processor, dict):
        return []
    tokens = [*(post_processor.get("special_tokens") or {})]
    tokens += [post_processor[key][0] for key in ("cls", "sep") if key in post_processor]
    return tokens + [token for part in post_processor.get("processors") or [] for token in _inserted_tokens(part)]


def _kept_vocabulary(vocabulary: Any, removed: Collection[str]) -> Any:
    if isinstance(vocabulary, list):
        return [pair for pair in vocabulary if pair[0] not in removed]
    return {token: number for token, number in vocabulary.items() if token not in removed}


def _uses(merge: Any, removed: Collection[str]) -> bool:
    """Return whether a merge (`"a b"` or `["a", "b"]`) reads or makes a removed token."""
    parts = merge.split(" ") if isinstance(merge, str) else list(merge)
    return any(token in removed for token in (*parts, "".join(parts)))
