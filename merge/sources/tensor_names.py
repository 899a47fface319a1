"""Tensor names: decoder layers, token embedding and output head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
