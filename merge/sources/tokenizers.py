"""Tokenizers in a merge: policies for models with different tokenizers.

Row i of an embedding belongs to token i of the tokenizer. If tokenizers differ, rows are looked up by token, so that
rows of the same token are merged:

| Policy | Output tokenizer | Row of a token that a model lacks |
|---|---|---|
| `refuse` | | different tokenizers are an error |
| `base` | the seed's (or the first model's) | the seed's row |
| `union` | the seed's, plus tokens added by other models | added tokens: in all models, the mean row of the models that have them |
| a model's name | that model's | that model's row |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.artefacts.digests import TOKENIZER_FILES
from ...core.artefacts.files import copy_files, read_json, write_json, write_text
from ...core.errors import UserError, unknown_name
from ..recipes.recipe import TokenSource

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
POLICIES = ("refuse", "base", "union")
_PARTS = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
_ROUND_SIZES = (256, 128, 64, 32, 16, 8)
_EXAMPLES = 3


@dataclass(frozen=True)
class ModelVocabulary:
    """Tokenizer and embedding size of one model."""

    name: str
    folder: Path
    rows: int
    """Number of embedding rows; larger than the number of tokens if padded."""

    @cached_property
    def content(self) -> dict[str, Any] | None:
        """Content of tokenizer.json; None if the folder has none."""
        path = self.folder / TOKENIZER_FILE
        return read_json(path) if path.is_file() else None

    @cached_property
    def parts(self) -> dict[str, Any] | None:
        """The sections of tokenizer.json that determine token ids; None without tokenizer.json."""
        return {part: self.content.get(part) for part in _PARTS} if self.content is not None else None

    @cached_property
    def added(self) -> dict[str, dict[str, Any]]:
        """Added tokens -> entry in tokenizer.json."""
        return {entry["content"]: entry for entry in (self.content or {}).get("added_tokens") or []}

    @cached_property
    def tokens(self) -> dict[str, int]:
        """All tokens -> token id; raises `UserError` without tokenizer.json."""
        if self.content is None:
            raise UserError(
                f"{self.folder} has no {TOKENIZER_FILE}, which is needed to compare tokenizers; write it with "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        vocabulary = self.content.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, list):  # unigram: a list of (token, score)
            vocabulary = {pair[0]: number for number, pair in enumerate(vocabulary)}
        return {**vocabulary, **{token: entry["id"] for token, entry in self.added.items()}}

    @property
    def num_tokens(self) -> int:
        """One more than the largest token id."""
        return max(self.tokens.values(), default=-1) + 1

    def is_equivalent(self, other: ModelVocabulary) -> bool:
        """Return whether two models have equivalent tokenizers and the same number of embedding rows."""
        if self.rows != other.rows:
            return False
        if self.parts is not None and other.parts is not None:
            return self.parts == other.parts
        for folder in (self.folder, other.folder):
            if not any((folder / name).is_file() for name in TOKENIZER_FILES):
                return True  # without tokenizer files, the tokenizer of the other model applies
        return _file_contents(self.folder) == _file_contents(other.folder)


@dataclass(frozen=True)
class VocabularyPlan:
    """Plan to merge the vocabularies of several models into one."""

    source: Path
    """Folder of the output's tokenizer."""
    size: int
    """Number of embedding rows of the output."""
    rows: Mapping[str, tuple[int, ...]]
    """Model name -> source row of each output row, -1 if missing; only for models whose rows move."""
    fills: Mapping[int, tuple[str, ...]]
    """Output row -> models whose mean row is used by models that lack it."""
    shared: frozenset[int] = frozenset()
    """Output rows that all models take from `fills`, even if they have the row."""
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Tokens added to the tokenizer of `source` -> entry of tokenizer.json."""
    notes: tuple[str, ...] = ()

    def rearrange(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the models' tensors, rearranged from (rows, ...) to (size, ...); rows that no model has are zero."""
        rearranged: dict[str, NDArray[Any]] = {}
        for name, tensor in tensors.items():
            rows = np.asarray(self.rows.get(name, range(self.size)))
            rows = np.where(rows < tensor.shape[0], rows, -1)
            is_present = (rows >= 0).reshape(-1, *[1] * (tensor.ndim - 1))
            rearranged[name] = np.where(is_present, tensor[np.maximum(rows, 0)], tensor.dtype.type(0))
        missing = {name: self._missing_rows(name, tensor.shape[0]) for name, tensor in tensors.items()}
        for row in sorted(set().union(self.shared, *missing.values())):
            models_with_row = [name for name in tensors if row not in missing[name]]
            source_models = [name for name in self.fills.get(row, ()) if name in models_with_row] or models_with_row
            if not source_models:
                continue  # padding that no model has stays zero
            value = np.mean([rearranged[name][row].astype("f8") for name in source_models], axis=0)
            for name in tensors:
                if row in self.shared or row in missing[name]:
                    rearranged[name][row] = value
        return rearranged

    def _missing_rows(self, name: str, rows: int) -> set[int]:
        source_rows = self.rows.get(name)
        if source_rows is None:
            return set(range(rows, self.size))
        return {row for row, source_row in enumerate(source_rows) if source_row < 0 or source_row >= rows}


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
    size = _size(base_model, len(added), pad_to_multiple_of)
    token_ids = {**base_model.tokens, **{token: entry["id"] for token, entry in added.items()}}
    rows = {name: _source_rows(model, token_ids, size, model is base_model) for name, model in models.items()}
    fills, shared = _fills(base_model, models, token_ids, added, token_sources)
    return VocabularyPlan(
        source=base_model.folder,
        size=size,
        rows={name: source_rows for name, source_rows in rows.items() if source_rows != tuple(range(size))},
        fills=fills,
        shared=frozenset(shared),
        added=added,
        notes=tuple(f"token '{token}' is added to the tokenizer with id {added[token]['id']}" for token in added),
    )


def _file_contents(folder: Path) -> dict[str, bytes]:
    names = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _difference(base: ModelVocabulary, other: ModelVocabulary) -> str:
    prefix = f"the tokenizers of '{base.name}' ({base.folder}) and '{other.name}' ({other.folder}) differ: "
    hint = "; choose a policy: --tokenizer base, union, or a model's name (tokenizer_source in a mergekit file)"
    if base.content is None or other.content is None or base.tokens == other.tokens:
        if base.rows != other.rows:
            return f"{prefix}the same tokens, but {base.rows:,} and {other.rows:,} embedding rows{hint}"
        return f"{prefix}the same tokens, but different tokenisation rules{hint}"
    base_tokens, other_tokens = base.tokens, other.tokens
    changed = sorted(
        (token for token in {*base_tokens, *other_tokens} if base_tokens.get(token) != other_tokens.get(token)),
        key=lambda token: (other_tokens.get(token, base_tokens.get(token, 0)), token),
    )
    examples = ", ".join(
        f"{token!r} is {base_tokens.get(token, 'missing')} and {other_tokens.get(token, 'missing')}"
        for token in changed[:_EXAMPLES]
    )
    return f"{prefix}{len(base_tokens):,} and {len(other_tokens):,} tokens, {len(changed):,} of them different ({examples}){hint}"


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


def _source_rows(model: ModelVocabulary, token_ids: Mapping[str, int], size: int, leading: bool) -> tuple[int, ...]:
    """Return the model's row of the same token for each output row, -1 if missing."""
    if leading or model.content is None:
        return tuple(row if row < model.rows else -1 for row in range(size))
    source_rows = [-1] * size
    output_ids = set(token_ids.values())
    own_ids = set(model.tokens.values())
    for row in range(min(size, model.rows)):
        if row not in output_ids and row not in own_ids:
            source_rows[row] = row  # padding stays in place
    for token, row in token_ids.items():
        if row < size:
            source_rows[row] = model.tokens.get(token, -1)
    return tuple(source_rows)


def _fills(
    leading: ModelVocabulary,
    models: Mapping[str, ModelVocabulary],
    token_ids: Mapping[str, int],
    added: Mapping[str, Any],
    token_sources: Mapping[str, TokenSource],
) -> tuple[dict[int, tuple[str, ...]], set[int]]:
    """Return the source models of missing rows, and the rows that all models take from them."""
    fills: dict[int, tuple[str, ...]] = {}
    shared: set[int] = set()
    for token, row in token_ids.items():
        if token in added:
            fills[row] = tuple(
                name for name, model in models.items() if model.content is not None and token in model.tokens
            )
        else:
            fills[row] = (leading.name,)
    for token, source in token_sources.items():
        if token not in token_ids:
            raise unknown_name("token", token, token_ids, listed_as="the output has")
        if source.model not in models:
            raise unknown_name(f"model for token '{token}'", source.model, models, listed_as="this merge takes")
        if token not in models[source.model].tokens:
            raise UserError(f"'{source.model}' has no token '{token}' to take the row from")
        fills[token_ids[token]] = (source.model,)
        if source.force:
            shared.add(token_ids[token])
    return fills, shared


def write_tokenizer(plan: VocabularyPlan | None, leading: Path, output: Path) -> None:
    """Write the output's tokenizer files: byte-identical copies, plus added tokens as in the tokenizers library."""
    copy_files(plan.source if plan is not None else leading, output, TOKENIZER_FILES)
    if plan is None or not plan.added:
        return
    content = read_json(output / TOKENIZER_FILE)
    content["added_tokens"] = [*content.get("added_tokens", []), *plan.added.values()]
    _write(output / TOKENIZER_FILE, content)
    config_file, ids_file = output / "tokenizer_config.json", output / "added_tokens.json"
    if config_file.is_file():
        config = read_json(config_file)
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] |= {
                str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
                for entry in plan.added.values()
            }
            _write(config_file, config)
    if ids_file.is_file():
        ids = {token: entry["id"] for token, entry in plan.added.items()}
        _write(ids_file, {**read_json(ids_file), **ids})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False))


def write_chat_template(wanted: str, models: Sequence[Path], output: Path) -> None:
    """Write the chat template of a recipe's setting into a folder with tokenizer files, if there is one."""
    text = chat_template(wanted, models)
    if text is None:
        return
    write_text(output / TEMPLATE_FILE, text)
    config = output / "tokenizer_config.json"
    if config.is_file() and "chat_template" in (content := read_json(config)):
        write_json(config, content | {"chat_template": text})


def chat_template(wanted: str, models: Sequence[Path]) -> str | None:
    """Return the chat template for a recipe's setting: `auto` (the models' most common one) or the template text.

    None if `auto` finds none. Raises `UserError` for any other value.
    """
    if wanted == "auto":
        templates = [text for text in map(template_of, models) if text is not None]
        return max(templates, key=templates.count) if templates else None
    if "{" in wanted:
        return wanted
    raise UserError(f"chat_template '{wanted}' is neither 'auto' nor a template; give the text of the template")


def template_of(folder: Path) -> str | None:
    """Return a model's chat template; None if it has none."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None
