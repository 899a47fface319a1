"""Tensor names: which decoder layer a tensor belongs to, and which are the token embedding and the output head."""

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
    """The tensor names of one checkpoint, sorted into the layers of its decoder and what stands outside."""

    stack: str
    """What comes before a layer's number: `model.layers`; empty for a model without layers."""
    layers: tuple[tuple[str, ...], ...]
    """For each layer, what comes after its number, in the checkpoint's order."""
    before: tuple[str, ...]
    """Whole names of tensors that come before the layers: embeddings."""
    after: tuple[str, ...]
    """Whole names of everything else: the last norm, the output head."""

    def name(self, layer: int, rest: str) -> str:
        """Return the whole name of a layer's tensor."""
        return f"{self.stack}.{layer}.{rest}"


def layer_names(names: Iterable[str]) -> LayerNames:
    """Sort tensor names by layer; the decoder's layers are the largest stack of numbered modules."""
    everything = list(names)
    found = [(name, _IN_A_STACK.match(name)) for name in everything]
    stacks = Counter(match["stack"] for _, match in found if match is not None)
    if not stacks:
        return LayerNames("", (), *_outside(everything))
    stack = max(stacks, key=lambda one: stacks[one])
    layers: dict[int, list[str]] = {}
    outside = []
    for name, match in found:
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
    """Return the name of the token embedding, None where there is none that is known."""
    return next((name for name in tensors if name.endswith(TOKEN_EMBEDDINGS)), None)


def head_name(tensors: Mapping[str, Any]) -> str | None:
    """Return the name of the output head, None where the model is tied to its embedding."""
    return next((name for name in HEADS if name in tensors), None)
