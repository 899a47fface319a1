"""Tensor names: decoder layers, token embedding and output head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.models.stored_names import loaded_names

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
TOKEN_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_IN_A_STACK = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.(?P<rest>.+)$")
_FIRST = (*TOKEN_EMBEDDINGS, "wpe.weight", "position_embeddings.weight")


@dataclass(frozen=True)
class LayerNames:
    """Tensor names of one checkpoint by decoder layer."""

    stack: str
    """Prefix of the layer index, such as `model.layers`; empty for a model without layers."""
    layers: tuple[tuple[str, ...], ...]
    """For each layer, the name suffixes after the layer index, in checkpoint order."""
    before: tuple[str, ...]
    """Full names of tensors before the layers: embeddings."""
    after: tuple[str, ...]
    """Full names of all other tensors: final norm, output head."""

    def name(self, layer: int, suffix: str) -> str:
        """Return the full name of a layer's tensor."""
        return f"{self.stack}.{layer}.{suffix}"


def layer_names(names: Iterable[str]) -> LayerNames:
    """Group tensor names by layer; the decoder layers are the largest list of numbered modules."""
    all_names = list(names)
    matches = [(name, _IN_A_STACK.match(name)) for name in all_names]
    stacks = Counter(match["stack"] for _, match in matches if match is not None)
    if not stacks:
        return LayerNames("", (), *_outside(all_names))
    stack = max(stacks, key=lambda candidate: stacks[candidate])
    layers: dict[int, list[str]] = {}
    outside = []
    for name, match in matches:
        if match is not None and match["stack"] == stack:
            layers.setdefault(int(match["index"]), []).append(match["rest"])
        else:
            outside.append(name)
    ordered = tuple(tuple(layers.get(index, ())) for index in range(max(layers) + 1))
    return LayerNames(stack, ordered, *_outside(outside))


def _outside(names: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    before = tuple(name for name in names if name.endswith(_FIRST))
    return before, tuple(name for name in names if name not in before)


def embedding_name(tensors: Mapping[str, Any]) -> str | None:
    """Return the name of the token embedding; None if no known name is present."""
    return next((name for name in tensors if name.endswith(TOKEN_EMBEDDINGS)), None)


def head_name(tensors: Mapping[str, Any]) -> str | None:
    """Return the name of the output head; None if it is tied to the embedding."""
    return next((name for name in HEADS if name in tensors), None)


def aligned_names(
    leading: tuple[Path, Iterable[str]], other: tuple[Path, Iterable[str]], ignored: tuple[str, ...]
) -> dict[str, str]:
    """Return the tensors of another checkpoint (folder, names) whose names differ from the leading one's -> its names.

    Checkpoints of a family come under several names, such as with and without a prefix. `ignored` are suffixes of tensors
    that do not count. Raises `UserError` if they store the same tensors in another layout.
    """
    names = [[name for name in part if not f".{name}".endswith(ignored)] for _, part in (leading, other)]
    differing = _kinds(names[0]) ^ _kinds(names[1])
    if not differing or (len(differing) == 1 and differing <= set(HEADS)):  # one of them ties its head
        return {}
    loaded = [loaded_names(folder, part) for (folder, _), part in zip((leading, other), names, strict=True)]
    by_memory = {memory: name for name, (memory, _) in loaded[0].items()}
    for name, (memory, is_whole) in loaded[1].items():
        if memory in by_memory and is_whole != loaded[0][by_memory[memory]][1]:
            raise UserError(
                f"{leading[0]} and {other[0]} store the same tensors in different layouts ('{by_memory[memory]}', '{name}'); "
                "load the latter with from_pretrained and save it again with save_pretrained, and import a seed again"
            )
    renamed = {
        name: by_memory[memory] for name, (memory, is_whole) in loaded[1].items() if is_whole and memory in by_memory
    }
    return {name: target for name, target in renamed.items() if name != target}


def _kinds(names: Iterable[str]) -> set[str]:
    """Return the names without numbers, which are the same for models of different depth."""
    return {re.sub(r"\d+", "#", name) for name in names}
