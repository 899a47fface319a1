"""Keys of a memory: what a model computes of a text right before it predicts.

The key of a token is the input of the last layer's feed-forward network, after its norm (arXiv:1911.00172, section 2).
Blocks without a norm there, such as OLMo 2's, feed it the raw residual stream; their keys are final hidden states, after the
last norm. Shapes: B = texts, T = tokens, d = width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....errors import UserError
from ...feed_forwards import feed_forwards, require_plain
from .manifest import KeyKind


class KeyReader:
    """Reads the keys of a model in passes within `reading()`, each thread those of its own passes."""

    def __init__(self, model: PreTrainedModel, kind: KeyKind) -> None:
        self.kind = kind
        self._own = threading.local()
        _module_of(model, kind).register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if getattr(self._own, "is_reading", False):
            self._own.keys = arguments[0] if arguments else named["hidden_states"]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep the keys of the last pass in this block."""
        self._own.is_reading = True
        try:
            yield
        finally:
            self._own.is_reading = False

    def take(self, count: int) -> Tensor:
        """Return the keys of the last tokens of that pass in float32, (B, count, d), and forget them."""
        keys: Tensor = self._own.keys
        del self._own.keys
        return keys.detach().reshape(-1, keys.shape[-2], keys.shape[-1])[:, -count:].float()


def key_kind(model: PreTrainedModel) -> KeyKind:
    """Return what the keys of a model are; raises `UserError` for a model without a key of each token."""
    kind: KeyKind = "feed_forward_input" if _has_norm_before_feed_forward(model) else "final_hidden_state"
    _module_of(model, kind)
    return kind


def _module_of(model: PreTrainedModel, kind: KeyKind) -> nn.Module:
    """Return the module whose input the keys are."""
    if kind == "feed_forward_input":
        return feed_forwards(model)[-1].module
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise UserError(
            f"{type(model).__name__} has neither a feed-forward network behind a norm nor an output layer, whose input is the "
            "key of a memory; use a model of another family"
        )
    return head


def _has_norm_before_feed_forward(model: PreTrainedModel) -> bool:
    """Return whether the last layer's feed-forward network gets the output of a norm, by a pass over one token."""
    try:
        network = feed_forwards(model)[-1]
        require_plain(network.module)
    except UserError:  # an unknown family, or a feed-forward network of several modules
        return False
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: outputs.append(output))
        for module in network.parent.modules()
        if "norm" in type(module).__name__.lower()
    ]
    hooks.append(network.module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])))
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return len(inputs) == 1 and any(output is inputs[0] for output in outputs)
