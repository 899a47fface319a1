"""The objective `preference`: direct preference optimisation on pairs of answers (arXiv:2305.18290, equation 7).

Shapes: B = pairs in a forward pass, T = predicted tokens of a block, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_positive
from ...core.hooks.steps import Batch, Loss, Objective, ObjectiveContext, TrainingObjective

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PreferenceOptions:
    """Options of `preference`."""

    beta: float = 0.1
    """How strongly the model is held to the one that training starts from."""

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)


@hookimpl
def objectives() -> list[Objective]:
    """Return the objective."""
    summary = "the better answer of a pair before the worse one (DPO), from domains of the format preference"
    return [Objective("preference", summary, prepare, PreferenceOptions, reads=("pairs",))]


def prepare(context: ObjectiveContext) -> TrainingObjective:
    """Keep the model that training starts from as the reference."""
    return Preference(context.open_start(), context.options.beta)


class Preference(TrainingObjective):
    """DPO with a frozen reference model."""

    def __init__(self, reference: PreTrainedModel, beta: float) -> None:
        self._reference = reference.eval().requires_grad_(False)
        self._beta = beta

    def loss(self, forward: Callable[..., Any], batch: Batch, next_token: Loss) -> Tensor:
        """Return -log sigmoid(beta (margin of the model - margin of the reference)), the mean over pairs, in nats."""
        import torch
        from torch.nn import functional as F

        if self._reference.device != batch.tokens.device:
            self._reference.to(batch.tokens.device)
        with torch.no_grad():
            reference_B = margins(self._reference, batch)
        return -F.logsigmoid(self._beta * (margins(forward, batch) - reference_B)).mean()

    def num_terms(self, batch: Batch) -> int:
        """Return the number of pairs."""
        return len(batch.tokens)


def margins(forward: Callable[..., Any], batch: Batch) -> Tensor:
    """Return log p(chosen) - log p(rejected) of the tokens that count, (B,)."""
    from torch.nn import functional as F

    assert batch.counted is not None, "a pair says what counts"
    assert batch.positions is not None, "positions tell the conversations of a pair apart"
    logits_BTV = forward(**batch.inputs).logits.float()
    log_probs_BT = -F.cross_entropy(logits_BTV.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    conversation_BT = (batch.positions == 0).cumsum(dim=1)  # 1: chosen, 2: rejected, 3: filling
    signs_BT = (conversation_BT == 1).float() - (conversation_BT == 2).float()
    return (log_probs_BT * signs_BT * batch.counted).sum(dim=1)
