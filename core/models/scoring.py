"""Token log-probabilities under any causal language model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..text.token_store import Windows


def begin_text(model: PreTrainedModel, domain: str | None = None) -> bool:
    """Let a model whose weights depend on earlier texts forget them; the next ones are of `domain`.

    Returns whether the model has weights of its own for that domain.
    """
    if not hasattr(model, "begin_text"):
        return False
    ensemble: Any = model
    is_known = domain in ensemble.text_domains
    ensemble.begin_text(domain if is_known else None)
    return is_known


def learns_from_text(model: PreTrainedModel) -> bool:
    """Return whether scored text changes how a model scores later text, so that a text has to be scored in order."""
    return bool(getattr(model, "learns_from_text", False))


def token_log_probs(model: PreTrainedModel, tokens_BT1: Tensor) -> Tensor:
    """Return log p(x_t | x_<t) in float32 for all but the first token, shape (B, T).

    The model may be on another device than the tokens, where the result is. Uses the model's `target_log_probs` if it has one, which scores targets without the full distribution.
    """
    import torch

    if hasattr(model, "target_log_probs"):
        scored: Tensor = model.target_log_probs(tokens_BT1)
        return scored
    home, tokens_BT1 = tokens_BT1.device, tokens_BT1.to(model.device)
    logits_BTV = model(input_ids=tokens_BT1[:, :-1], use_cache=False).logits
    targets_BT = tokens_BT1[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
    return -loss.view_as(targets_BT).to(home)


def continuation_log_probs(
    model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int = 16
) -> list[float]:
    """Return log p(target | prefix), in nats, for pairs of prefix and target in tokens; prefixes are not empty."""
    import torch

    results = []
    for begin in range(0, len(pairs), batch_size):
        batch = pairs[begin : begin + batch_size]
        longest = max(len(prefix) + len(target) for prefix, target in batch)
        # padding follows the text, which does not attend to it
        rows = [[*prefix, *target, *[prefix[-1]] * (longest - len(prefix) - len(target))] for prefix, target in batch]
        with torch.inference_mode():
            scores = token_log_probs(model, torch.tensor(rows, device=model.device)).double()
        for row, (prefix, target) in zip(scores, batch, strict=True):
            results.append(float(row[len(prefix) - 1 : len(prefix) + len(target) - 1].sum()))
    return results


def total_loss(model: PreTrainedModel, batches: Iterable[Windows]) -> tuple[float, int]:
    """Return the summed cross-entropy of all targets that windows score, in nats, and their number."""
    total, count = 0.0, 0
    for batch in batches:
        loss, scored = scored_loss(model, batch)
        total, count = total + loss, count + scored
    return total, count


def scored_loss(model: PreTrainedModel, windows: Windows) -> tuple[float, int]:
    """Return the summed cross-entropy of the targets that windows score, in nats, and their number."""
    scores, scored = scored_log_probs(model, windows)
    return -float(scores.masked_fill(~scored, 0.0).sum()), int(scored.sum())


def scored_log_probs(model: PreTrainedModel, windows: Windows) -> tuple[Tensor, Tensor]:
    """Return log p of the targets of windows in float64, and whether each is scored, both (B, T)."""
    import torch

    scores = token_log_probs(model, torch.from_numpy(windows.tokens).to(model.device)).double()
    return scores, torch.from_numpy(windows.scored).to(model.device)
