"""Plans the vocabulary of a merge: policies for models with different tokenizers.

Row i of an embedding belongs to token i of the tokenizer. If tokenizers differ, rows are looked up by token, so that
rows of the same token are merged:

| Policy | Output tokenizer | Row of a token that a model lacks |
|---|---|---|
| `refuse` | | different tokenizers are an error |
| `base` | the seed's (or the first model's) | the seed's row |
| `union` | the seed's, plus tokens added by other models | added tokens: the mean row of the models that have them |
| a model's name | that model's | that model's row |

Tokens that a tokenizer declares, but that have no embedding row, are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ....core.errors import UserError, unknown_name
from ...recipes.places import placed
from ...recipes.recipe import TokenSource
from .model_vocabulary import ModelVocabulary
from .row_mapping import SourceRow, VocabularyPlan

POLICIES = ("refuse", "base", "union")
_ROUND_SIZES = (256, 128, 64, 32, 16, 8)
_EXAMPLES = 3
_NEW_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""Entry of a token that no tokenizer describes, as the tokenizers library adds it."""


def plan_vocabulary(
    base: ModelVocabulary,
    others: Mapping[str, ModelVocabulary],
    policy: str,
    tokens: Mapping[str, TokenSource] | None = None,
    pad_to_multiple_of: int | None = None,
) -> VocabularyPlan | None:
    """Return the plan of the merged vocabulary; None if all are the same and no other change is requested.

    Raises `UserError` if tokenizers differ without a policy, and for the policy `union` if they differ in more than
    added tokens.
    """
    models = {base.name: base, **others}
    if policy not in POLICIES and policy not in models:
        raise unknown_name("tokenizer policy", policy, [*POLICIES, *models], listed_as="there are")
    different = [other for other in others.values() if not base.is_equivalent(other)]
    token_sources = tokens or {}
    is_change_requested = bool(token_sources) or pad_to_multiple_of is not None or policy in others
    if not different and not is_change_requested:
        return None
    if different and policy == "refuse":
        raise UserError(_difference(base, different[0]))
    base_model = models.get(policy, base)
    added = _added_tokens(base_model, models.values()) if policy == "union" else {}
    added |= _requested_tokens(base_model, models, token_sources, added)
    size = _size(base_model, len(added), pad_to_multiple_of)
    token_ids = {**base_model.tokens, **{token: entry["id"] for token, entry in added.items()}}
    rows = {
        name: _source_rows(model.rows, (model if model.content is not None else base).tokens, token_ids, size)
        for name, model in models.items()
    }
    own = {token: _own_row(token, source, models) for token, source in token_sources.items()}
    fills = _fills(base_model, models, token_ids, added) | {token_ids[token]: row for token, row in own.items()}
    return VocabularyPlan(
        source=base_model.folder,
        size=size,
        rows={name: source_rows for name, source_rows in rows.items() if source_rows != tuple(range(size))},
        fills=fills,
        shared=frozenset(token_ids[token] for token, source in token_sources.items() if source.force),
        added=added,
        removed=base_model.without_row,
        notes=(
            *(note for model in models.values() if (note := model.note_on_rows()) is not None),
            *(f"token '{token}' is added to the tokenizer with id {added[token]['id']}" for token in added),
        ),
    )


def _difference(base: ModelVocabulary, other: ModelVocabulary) -> str:
    prefix = f"the tokenizers of '{base.name}' ({base.folder}) and '{other.name}' ({other.folder}) differ: "
    hint = "; choose a policy: --tokenizer base, union, or a model's name (tokenizer_source in a mergekit file)"
    if base.declared is None or other.declared is None or _declared(base) == _declared(other):
        if base.rows != other.rows:
            return f"{prefix}the same tokens, but {base.rows:,} and {other.rows:,} embedding rows{hint}"
        return f"{prefix}the same tokens, but different tokenisation rules{hint}"
    base_tokens, other_tokens = _declared(base), _declared(other)
    changed = sorted(
        (token for token in {*base_tokens, *other_tokens} if base_tokens.get(token) != other_tokens.get(token)),
        key=lambda token: (other_tokens.get(token, base_tokens.get(token, 0)), token),
    )
    examples = ", ".join(
        f"{token!r} is {base_tokens.get(token, 'missing')} and {other_tokens.get(token, 'missing')}"
        for token in changed[:_EXAMPLES]
    )
    return f"{prefix}{len(base_tokens):,} and {len(other_tokens):,} tokens, {len(changed):,} of them different ({examples}){hint}"


def _declared(model: ModelVocabulary) -> dict[str, int]:
    return {**model.tokens, **model.without_row}


def _added_tokens(base: ModelVocabulary, models: Iterable[ModelVocabulary]) -> dict[str, dict[str, Any]]:
    """Return added tokens of other models, ids in padding rows first; raises `UserError` for any other difference."""
    new_tokens: dict[str, dict[str, Any]] = {}
    for model in models:
        if model.content is None or base.content is None:
            continue
        for part in ("model", "normalizer", "pre_tokenizer"):
            if base.content.get(part) != model.content.get(part):
                raise UserError(
                    f"the tokenizers of '{base.name}' and '{model.name}' cannot be united: they differ in their '{part}', "
                    "not only in added tokens; use --tokenizer base, which looks up rows by token"
                )
        for token, entry in sorted(model.added.items(), key=lambda pair: pair[1]["id"]):
            if token not in base.tokens and token not in new_tokens:
                new_tokens[token] = {**entry, "id": base.num_tokens + len(new_tokens)}
    return new_tokens


def _requested_tokens(
    base: ModelVocabulary,
    models: Mapping[str, ModelVocabulary],
    tokens: Iterable[str],
    added: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return those of `tokens` that are new in the output, beside the `added` ones, with the entry of a model."""
    new_tokens: dict[str, dict[str, Any]] = {}
    for token in tokens:
        if token not in base.tokens and token not in added:
            entry = next((model.added[token] for model in models.values() if token in model.added), _NEW_TOKEN)
            new_tokens[token] = {**entry, "content": token, "id": base.num_tokens + len(added) + len(new_tokens)}
    return new_tokens


def _size(base: ModelVocabulary, num_added: int, multiple: int | None) -> int:
    num_tokens = base.num_tokens if base.content is not None else base.rows
    needed = num_tokens + num_added
    if multiple is not None:
        return -(-needed // multiple) * multiple
    if needed <= base.rows:
        return base.rows
    for padding in _ROUND_SIZES:  # keep the padding multiple of a padded embedding
        if base.rows > num_tokens and base.rows % padding == 0:
            return -(-needed // padding) * padding
    return needed


def _source_rows(
    num_rows: int, tokens: Mapping[str, int], output_tokens: Mapping[str, int], size: int
) -> tuple[int, ...]:
    """Return a model's row of the same token for each output row, -1 if it has none; padding stays in place."""
    source_rows = [-1] * size
    taken = {*output_tokens.values(), *tokens.values()}
    for row in range(min(size, num_rows)):
        if row not in taken:
            source_rows[row] = row
    for token, row in output_tokens.items():
        if row < size:
            source_rows[row] = tokens.get(token, -1)
    return tuple(source_rows)


def _own_row(token: str, source: TokenSource, models: Mapping[str, ModelVocabulary]) -> tuple[SourceRow, ...]:
    """Return the row that a token takes; none for zeros."""
    if source.model is None:
        return ()
    with placed(source.place):
        if source.model not in models:
            raise unknown_name(f"model for token '{token}'", source.model, models, listed_as="this merge takes")
        return ((source.model, models[source.model].row_of(source.token if source.token is not None else token)),)


def _fills(
    leading: ModelVocabulary,
    models: Mapping[str, ModelVocabulary],
    token_ids: Mapping[str, int],
    added: Mapping[str, Any],
) -> dict[int, tuple[SourceRow, ...]]:
    """Return the source rows of missing rows: those of the leading model, or of all models that have a new token."""
    return {
        row: tuple((name, model.tokens[token]) for name, model in models.items() if model.has(token))
        if token in added
        else ((leading.name, row),)
        for token, row in token_ids.items()
    }
