"""The loss of next-token prediction, and how it is computed in less memory or apart for every document.

Shapes: B = blocks in a forward pass, T = predicted tokens of a block, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.errors import UserError
from ....core.hooks.steps import IGNORED, Batch, Loss

Forward = Callable[..., Any]
WHOLE_LOGITS_BYTES = 2**28
"""Size of the float32 logits of a forward pass (256 MiB) above which they are computed in pieces unless settings differ."""
PIECE_BYTES = 2**26
"""Size of the float32 logits that are in memory at a time (64 MiB), where that is enough for `LEAST_ROWS` tokens."""
LEAST_ROWS = 64
"""Fewest tokens at a time: the gradient of the whole output layer is read and written for every piece."""
_PROBED = 8


def next_token_loss(forward: Forward, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the targets that count, in nats per token, shape (); 0 if there are none."""
    logits_BTV = forward(**batch.inputs).logits
    return mean_cross_entropy(F.cross_entropy, logits_BTV.flatten(0, 1).float(), batch=batch)


def mean_cross_entropy(cross_entropy: Callable[..., Tensor], *inputs: Tensor, batch: Batch, **options: Any) -> Tensor:
    """Return the mean of a torch loss over the targets of a batch that count; 0 if there are none."""
    targets = batch.targets.flatten()
    if batch.counted is None:
        return cross_entropy(*inputs, targets, **options)
    total = cross_entropy(*inputs, targets, ignore_index=IGNORED, reduction="sum", **options)
    return total / batch.counted.sum().clamp(min=1)


# --- pieces of the logits ---


class ChunkedHead:
    """The output layer of a model, which returns the mean loss in place of logits while it has targets.

    torch computes the logits of some tokens at a time together with their gradients. The rest of the model, and whatever wraps
    it, runs as before.
    """

    def __init__(self, head: nn.Linear) -> None:
        self._head, self._logits = head, head.forward
        self._batch: Batch | None = None
        head.forward = self  # type: ignore[assignment]  # called by the module, as its own method was

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        if self._batch is None:
            return self._logits(hidden_BTD)
        weight: Tensor = self._head.weight
        bias: Tensor | None = self._head.bias
        device = hidden_BTD.device.type
        if torch.is_autocast_enabled(device):  # which does not know this operation
            dtype = torch.get_autocast_dtype(device)
            hidden_BTD, weight = hidden_BTD.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        rows = max(PIECE_BYTES // (4 * weight.shape[0]), LEAST_ROWS)
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
        loss = mean_cross_entropy(
            F.linear_cross_entropy,
            hidden_BTD.flatten(0, 1),
            weight,
            batch=self._batch,
            linear_bias=bias,
            options=options,
        )
        return loss.float()

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Return what `next_token_loss` returns, without ever holding all logits."""
        self._batch = batch
        try:
            loss: Tensor = forward(**batch.inputs).logits
        finally:
            self._batch = None
        return loss

    def undo(self) -> None:
        """Give the output layer its own method back."""
        del self._head.forward


def chunked_loss(module: nn.Module, forward: Forward, device: Any) -> Loss | None:
    """Return a loss that never holds all logits, or None for a model whose logits are not just those of a linear layer.

    `forward` is the module as its processes call it; all of them must call this.
    """
    find_head = getattr(module, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if type(head) is not nn.Linear or not hasattr(F, "linear_cross_entropy"):
        return None
    tokens = torch.arange(_PROBED + 1, device=device)[None]
    with _probing(module):
        outputs: list[Tensor] = []
        watched = head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        logits = forward(input_ids=tokens, use_cache=False).logits
        watched.remove()
        if len(outputs) != 1 or not torch.equal(outputs[0].float(), logits.float()):
            return None  # such as capped or scaled logits
        chunked = ChunkedHead(head)
        try:
            chunked.loss(forward, Batch(tokens))
        except (RuntimeError, TypeError, ValueError, IndexError):  # the model needs the logits for something else
            chunked.undo()
            return None
    return chunked.loss


# --- documents apart ---


def document_positions(tokens_BT: Tensor, separator: int) -> Tensor:
    """Return the position of each token in its document, (B, T); a document begins after a separator."""
    positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    begins_BT = torch.zeros_like(tokens_BT)
    begins_BT[:, 1:] = torch.where(tokens_BT[:, :-1] == separator, positions_T[1:], 0)
    return positions_T - begins_BT.cummax(dim=1).values


def require_separable_documents(
    module: nn.Module,
    forward: Forward,
    separator: int,
    device: Any,
    needed_by: str = "training.separate_documents",
    *,
    rows: int = 1,
) -> None:
    """Raise `UserError` for a model in which a document still depends on the one before it in the same block.

    `needed_by` is what needs it. There have to be several `rows` if a pass has: flash attention keeps documents
    apart only in a single one, and says nothing.
    """
    words = torch.arange(2 * _PROBED + 1, device=device)  # different ones: of equal words, attention tells nothing
    others = words[words != separator].expand(rows, -1)
    own = others[:, :_PROBED]
    before = torch.cat((others[:, _PROBED : 2 * _PROBED], torch.full_like(own[:, :1], separator)), dim=1)
    row = torch.cat((before, own), dim=1)
    with _probing(module):
        alone = forward(input_ids=own, use_cache=False, position_ids=document_positions(own, separator)).logits
        try:
            behind = forward(input_ids=row, use_cache=False, position_ids=document_positions(row, separator)).logits
        except TypeError:  # it takes no positions
            behind = None
    if behind is None or not torch.allclose(alone.float(), behind[:, before.shape[1] :].float(), rtol=1e-3, atol=1e-3):
        config = getattr(module, "config", None)
        kernel = getattr(config, "_attn_implementation", None) or "its own attention"
        raise UserError(
            f"{needed_by}: this model ({kernel}, {rows} blocks at a time) cannot keep the documents of a block apart; leave it "
            "out, or set training.attention to another kernel"
        )


@contextmanager
def _probing(module: nn.Module) -> Iterator[None]:
    """Run the block without gradients and dropout."""
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()


def separate_loss(loss: Loss, separator: int) -> Loss:
    """Return a loss whose tokens attend only to their own document, whose positions begin at 0."""

    @functools.wraps(loss)
    def separate(forward: Forward, batch: Batch) -> Tensor:
        if batch.positions is None:
            batch = replace(batch, positions=document_positions(batch.tokens[:, :-1], separator))
        return loss(forward, batch)

    return separate
