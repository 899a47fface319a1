"""Reads the sources of single tokens' embeddings from a mergekit configuration file (`tokenizer: tokens:`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...core.config.settings import Section
from ...core.errors import UserError, unknown_name
from .mergekit_models import NamedModels
from .recipe import TokenSource

_KINDS = {"zero": {"kind"}, "model_token": {"kind", "model", "token", "token_id"}}
"""Kind of a source -> its keys."""


class TokenSettings(Section):
    """Settings of one token."""

    source: Any = None
    force: bool = False


def read_token_sources(
    tokens: Mapping[str, TokenSettings], named: NamedModels, inputs: Collection[str]
) -> dict[str, TokenSource]:
    """Return the source of each token; raises `UserError` with file and line.

    `inputs` are the names of the merged models, which alone have embeddings to take.
    """
    sources = {}
    for token, settings in tokens.items():
        key = ("tokenizer", "tokens", token)
        place = named.at(*key)
        if settings.source is None:
            raise UserError(
                f"{place}: token '{token}' has no source; name a model, or write {{kind: model_token, ...}} or {{kind: zero}}"
            )
        model, other = _parse(settings.source, named, (*key, "source"))
        if model is not None and model not in inputs:
            raise UserError(
                f"{place}: the row of token '{token}' comes from '{model}', which is not one of the merged models: "
                f"{', '.join(inputs)}"
            )
        sources[token] = TokenSource(model, settings.force, other, place)
    return sources


def _parse(source: Any, named: NamedModels, key: tuple[Any, ...]) -> tuple[str | None, str | int | None]:
    """Return the model (None: zeros) and its token (None: the same token) of a source."""
    if not isinstance(source, dict) or "kind" not in source:
        return named.model(source, key), None
    place, kind = named.at(*key), str(source["kind"])
    if kind not in _KINDS:
        raise UserError(f"{place}: {unknown_name('kind of source', kind, _KINDS, listed_as='there are')}")
    unknown = sorted(set(source) - _KINDS[kind])
    if unknown:
        raise UserError(f"{place}: a source of kind '{kind}' has no key '{unknown[0]}'")
    if kind == "zero":
        return None, None
    others = [source[key] for key in ("token", "token_id") if source.get(key) is not None]
    if len(others) != 1 or source.get("model") is None:
        raise UserError(f"{place}: a source of kind 'model_token' needs a 'model', and one of 'token' and 'token_id'")
    is_valid = isinstance(source.get("token"), str | None) and isinstance(source.get("token_id"), int | None)
    if not is_valid or isinstance(source.get("token_id"), bool):
        raise UserError(f"{place}: 'token' must be a text, and 'token_id' a number")
    return named.model(source["model"], key), others[0]
