"""Tokenizers in a merge: the same ones pass, different ones need a policy that says which row means which token.

A row of an embedding means the token of its number. Where tokenizers differ, rows are looked up by token, so that what
is merged always means the same:

| policy | the output's tokenizer | a token that a model lacks |
|---|---|---|
| `refuse` | | different tokenizers are an error |
| `base` | the seed's (or the first model's) | takes the seed's row |
| `union` | the seed's, with the tokens that others added | added tokens take, in all models, the mean of those that have them |
| a model's name | that model's | takes that model's row |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.files import read_json, readable_os_errors, write_text
from ...core.artefacts.lineage import TOKENIZER_FILES
from ...core.errors import UserError, unknown_name
from ..recipes.recipe import TokenSource

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
POLICIES = ("refuse", "base", "union")
_PARTS = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
_ROUND_SIZES = (256, 128, 64, 32, 16, 8)
_EXAMPLES = 3


@dataclass(frozen=True)
class ModelVocabulary:
    """Which row of a model's embedding means which token."""

    name: str
    folder: Path
    rows: int
    """Rows of the embedding; more than there are tokens where it is padded."""

    @cached_property
    def content(self) -> dict[str, Any] | None:
        """Its tokenizer.json, None where the folder has none."""
        path = self.folder / TOKENIZER_FILE
        return read_json(path) if path.is_file() else None

    @cached_property
    def parts(self) -> dict[str, Any] | None:
        """What decides how text becomes numbers: padding, truncation and the file's layout do not."""
        if self.content is None:
            return None
        return {part: self.content.get(part) for part in _PARTS}

    @cached_property
    def added(self) -> dict[str, int]:
        """Tokens that were added to the trained ones."""
        found = (self.content or {}).get("added_tokens") or []
        return {token["content"]: token["id"] for token in found}

    @cached_property
    def tokens(self) -> dict[str, int]:
        """All tokens with their numbers; raises `UserError` where they cannot be read."""
        if self.content is None:
            raise UserError(
                f"{self.folder} has no {TOKENIZER_FILE}, so that its tokens cannot be compared with others'; write one "
                "with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        vocabulary = self.content.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, list):  # unigram: a list of (token, score)
            vocabulary = {pair[0]: number for number, pair in enumerate(vocabulary)}
        return {**vocabulary, **self.added}

    @cached_property
    def has_files(self) -> bool:
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)


@dataclass(frozen=True)
class VocabularyPlan:
    """How the vocabularies of several models become one."""

    source: Path
    """Folder whose tokenizer the output takes."""
    size: int
    """Rows of the output's embedding."""
    rows: Mapping[str, tuple[int, ...]]
    """For each model whose rows move: the row that each row of the output comes from, -1 where it has none."""
    fills: Mapping[int, tuple[str, ...]]
    """Rows of the output that some models lack: the models whose mean those take."""
    shared: frozenset[int] = frozenset()
    """Rows that all models take from `fills`, even those that have one."""
    added: Mapping[str, int] = field(default_factory=dict)
    """Tokens that the output's tokenizer has and `source`'s has not."""
    added_by: Mapping[str, Path] = field(default_factory=dict)
    """For each of them, the folder of the first model that has it."""
    notes: tuple[str, ...] = ()

    def rearranged(self, own: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the models' tensors (rows, ...) with the output's rows, each of shape (size, ...).

        Raises `UserError` when nobody has a row that is needed.
        """
        import numpy as np

        found: dict[str, NDArray[Any]] = {}
        for name, tensor in own.items():
            rows = np.asarray(self.rows.get(name, range(self.size)))
            rows = np.where(rows < tensor.shape[0], rows, -1)
            found[name] = np.where(
                (rows >= 0).reshape(-1, *[1] * (tensor.ndim - 1)),
                tensor[np.maximum(rows, 0)],
                tensor.dtype.type(0),
            )
        self._fill(found, own)
        return found

    def _fill(self, found: dict[str, NDArray[Any]], own: Mapping[str, NDArray[Any]]) -> None:
        import numpy as np

        lacking = {name: self._lacking(name, own[name].shape[0]) for name in own}
        for row in sorted(set().union(self.shared, *lacking.values())):
            having = [name for name in own if row not in lacking[name]]
            givers = [name for name in self.fills.get(row, ()) if name in having] or having
            if not givers:
                continue  # padding that no model has: zeros
            value = np.mean([found[name][row].astype("f8") for name in givers], axis=0)
            for name in own:
                if row in self.shared or row in lacking[name]:
                    found[name][row] = value

    def _lacking(self, name: str, rows: int) -> set[int]:
        taken = self.rows.get(name)
        if taken is None:
            return set(range(rows, self.size))
        return {row for row, own in enumerate(taken) if own < 0 or own >= rows}


def plan_vocabulary(
    base: ModelVocabulary,
    others: Mapping[str, ModelVocabulary],
    policy: str,
    tokens: Mapping[str, TokenSource] | None = None,
    pad_to_multiple_of: int | None = None,
) -> VocabularyPlan | None:
    """Return how the vocabularies become one, None where they are one already and nothing else is asked.

    Raises `UserError` that shows both sides where they differ and no policy allows it, and where they cannot be
    united.
    """
    known = {base.name: base, **others}
    if policy not in POLICIES and policy not in known:
        raise unknown_name("tokenizer policy", policy, [*POLICIES, *known], listed_as="there are")
    different = [other for other in others.values() if not _same(base, other)]
    wanted = tokens or {}
    asked = bool(wanted) or pad_to_multiple_of is not None or policy in others
    if not different and not asked:
        return None
    if different and policy == "refuse":
        raise UserError(_difference(base, different[0]))
    leading = known.get(policy, base)
    added = _added_tokens(leading, list(known.values())) if policy == "union" else {}
    size = _size(leading, len(added), pad_to_multiple_of)
    numbers = {**leading.tokens, **added} if (different or asked) else {}
    rows = {name: _rows(one, numbers, size, one is leading) for name, one in known.items()}
    fills, shared = _fills(leading, known, numbers, added, wanted)
    return VocabularyPlan(
        source=leading.folder,
        size=size,
        rows={name: taken for name, taken in rows.items() if taken != tuple(range(size))},
        fills=fills,
        shared=frozenset(shared),
        added=added,
        added_by={
            token: next(one.folder for one in known.values() if token in one.tokens) for token in added
        },
        notes=tuple(f"'{token}' is added to the tokenizer as {number}" for token, number in added.items()),
    )


def _same(one: ModelVocabulary, other: ModelVocabulary) -> bool:
    """Tell whether two tokenizers give the same numbers for every text, and their embeddings have as many rows."""
    if one.rows != other.rows:
        return False
    if one.parts is not None and other.parts is not None:
        return one.parts == other.parts
    if not other.has_files or not one.has_files:
        return True  # a folder without a tokenizer means that of the model it is merged with
    return _plain_bytes(one.folder) == _plain_bytes(other.folder)


def _plain_bytes(folder: Path) -> dict[str, bytes]:
    names = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _difference(base: ModelVocabulary, other: ModelVocabulary) -> str:
    """Return the sentence that shows how two tokenizers differ."""
    where = f"the tokenizers of '{base.name}' ({base.folder}) and '{other.name}' ({other.folder}) differ: "
    mend = (
        "; say what to do: --tokenizer base, union, or a model's name (tokenizer_source in a mergekit file)"
    )
    if base.content is None or other.content is None or base.tokens == other.tokens:
        if base.rows != other.rows:
            return f"{where}the same tokens, but {base.rows:,} and {other.rows:,} embedding rows{mend}"
        return f"{where}the same tokens, but other rules for cutting text{mend}"
    ours, theirs = base.tokens, other.tokens
    changed = sorted(
        (token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token)),
        key=lambda token: (theirs.get(token, ours.get(token, 0)), token),
    )
    examples = ", ".join(
        f"{token!r} is {ours.get(token, 'missing')} and {theirs.get(token, 'missing')}"
        for token in changed[:_EXAMPLES]
    )
    return f"{where}{len(ours):,} and {len(theirs):,} tokens, {len(changed):,} of them not the same ({examples}){mend}"


def _added_tokens(base: ModelVocabulary, models: Sequence[ModelVocabulary]) -> dict[str, int]:
    """Return the tokens that other models added, with the numbers they get; padding rows are used up first."""
    new: dict[str, int] = {}
    following = max(base.tokens.values(), default=-1) + 1
    for model in models:
        if model.content is None or base.content is None:
            continue
        _require_same_core(base, model)
        for token, _ in sorted(model.added.items(), key=lambda pair: pair[1]):
            if token not in base.tokens and token not in new:
                new[token] = following
                following += 1
    return new


def _require_same_core(base: ModelVocabulary, model: ModelVocabulary) -> None:
    """Raise `UserError` unless two tokenizers differ in nothing but added tokens."""
    assert base.parts is not None
    assert model.parts is not None
    for part in ("model", "normalizer", "pre_tokenizer"):
        if base.parts[part] != model.parts[part]:
            raise UserError(
                f"the tokenizers of '{base.name}' and '{model.name}' cannot be united: they differ in their '{part}', "
                "and only added tokens can; use --tokenizer base, which looks rows up by token"
            )


def _size(base: ModelVocabulary, num_added: int, multiple: int | None) -> int:
    used = max(base.tokens.values(), default=-1) + 1 if base.content is not None else base.rows
    needed = used + num_added
    if multiple is not None:
        return -(-needed // multiple) * multiple
    if needed <= base.rows:
        return base.rows
    for step in _ROUND_SIZES:  # an embedding that was padded stays so
        if base.rows > used and base.rows % step == 0:
            return -(-needed // step) * step
    return needed


def _rows(model: ModelVocabulary, numbers: Mapping[str, int], size: int, leading: bool) -> tuple[int, ...]:
    """Return for each row of the output the model's row of the same token."""
    if leading or model.content is None:
        return tuple(row if row < model.rows else -1 for row in range(size))
    taken = [-1] * size
    named = set(numbers.values())
    own = set(model.tokens.values())
    for row in range(min(size, model.rows)):
        if row not in named and row not in own:
            taken[row] = row  # padding is padding
    for token, row in numbers.items():
        if row < size:
            taken[row] = model.tokens.get(token, -1)
    return tuple(taken)


def _fills(
    leading: ModelVocabulary,
    models: Mapping[str, ModelVocabulary],
    numbers: Mapping[str, int],
    added: Mapping[str, int],
    wanted: Mapping[str, TokenSource],
) -> tuple[dict[int, tuple[str, ...]], set[int]]:
    """Return which models give each row that others lack, and which rows all models take from them."""
    fills: dict[int, tuple[str, ...]] = {}
    shared: set[int] = set()
    for token, row in numbers.items():
        if token in added:
            fills[row] = tuple(
                name for name, one in models.items() if one.content is not None and token in one.tokens
            )
            shared.add(row)  # in all models, so that every method gives this mean
        else:
            fills[row] = (leading.name,)
    for token, source in wanted.items():
        if token not in numbers:
            raise unknown_name("token", token, numbers, listed_as="the output has")
        if source.model not in models:
            raise unknown_name(
                f"model for token '{token}'", source.model, models, listed_as="this merge takes"
            )
        if token not in models[source.model].tokens:
            raise UserError(f"'{source.model}' has no token '{token}' that others could take")
        fills[numbers[token]] = (source.model,)
        if source.force:
            shared.add(numbers[token])
    return fills, shared


def write_tokenizer(plan: VocabularyPlan | None, leading: Path, output: Path) -> None:
    """Write the output's tokenizer files: those of their source, byte for byte, except for declared additions."""
    source = plan.source if plan is not None else leading
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            with readable_os_errors(output / name):
                (output / name).write_bytes((source / name).read_bytes())
    if plan is not None and plan.added:
        _declare(plan, output)


def _declare(plan: VocabularyPlan, output: Path) -> None:
    """Add the new tokens to the written files, in the layout that the tokenizers library writes."""
    content = read_json(output / TOKENIZER_FILE)
    content.setdefault("added_tokens", [])
    decoder: dict[str, Any] = {}
    for token, number in plan.added.items():
        entry = next(
            one
            for one in read_json(plan.added_by[token] / TOKENIZER_FILE)["added_tokens"]
            if one["content"] == token
        )
        content["added_tokens"].append({**entry, "id": number})
        decoder[str(number)] = {key: value for key, value in entry.items() if key != "id"}
    _write(output / TOKENIZER_FILE, content)
    if (output / "tokenizer_config.json").is_file():
        config = read_json(output / "tokenizer_config.json")
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] |= decoder
            _write(output / "tokenizer_config.json", config)
    if (output / "added_tokens.json").is_file():
        _write(output / "added_tokens.json", {**read_json(output / "added_tokens.json"), **plan.added})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False))


def chat_template(wanted: str, models: Mapping[str, Path]) -> str | None:
    """Return the chat template that a recipe asks for: `auto` (the most common of the models'), or the text itself.

    None where `auto` finds none. Raises `UserError` for anything else.
    """
    if wanted == "auto":
        found = [text for text in map(template_of, models.values()) if text is not None]
        return max(found, key=found.count) if found else None
    if "{" in wanted:
        return wanted
    raise UserError(f"chat_template '{wanted}' is neither 'auto' nor a template; paste the template's text")


def template_of(folder: Path) -> str | None:
    """Return a model's chat template, None where it has none."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    found = read_json(path).get("chat_template") if path.is_file() else None
    return found if isinstance(found, str) else None
