"""One forward pass of a posterior mixer: the weights of all members by the likelihood of the text under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core.hooks.ensembles import MixingPass
from ...core.models.kernels.posterior import PosteriorKind

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """Each member's predictions for the texts of a batch so far."""

    log_likelihoods: tuple[Tensor, ...] = ()
    """Log-likelihood of the text so far, (B,) per member; empty before the first token."""
    next_log_probs: tuple[Tensor, ...] = ()
    """Log-probabilities of the next token, (B, V) per member."""

    def __len__(self) -> int:
        return len(self.log_likelihoods[0]) if self.log_likelihoods else 0

    def select_rows(self, rows: Sequence[int]) -> Evidence:
        return Evidence(
            tuple(tensor[list(rows)] for tensor in self.log_likelihoods),
            tuple(tensor[list(rows)] for tensor in self.next_log_probs),
        )

    def append_rows(self, other: Evidence) -> Evidence:
        """Return the evidence of a batch with the rows of both."""
        import torch

        return Evidence(
            tuple(map(torch.cat, zip(self.log_likelihoods, other.log_likelihoods, strict=True))),
            tuple(map(torch.cat, zip(self.next_log_probs, other.next_log_probs, strict=True))),
        )


class PosteriorPass(MixingPass):
    """The posterior weights of one forward pass."""

    def __init__(
        self, log_prior_K: Tensor, ids_BT: Tensor, counts_BT: Tensor, before: Evidence, kind: PosteriorKind
    ) -> None:
        self._log_prior_K, self._ids_BT, self._counts_BT = log_prior_K, ids_BT, counts_BT
        self._before, self._kind = before, kind
        self._evidence: list[Tensor] = []
        """Evidence after each token, (B, T) per member."""
        self._log_likelihoods: list[Tensor] = []
        self._next_log_probs: list[Tensor] = []

    def log_weights(self, member: int, log_probs_BTV: Tensor) -> Tensor:
        next_log_probs = self._before.next_log_probs[member] if self._before.next_log_probs else None
        token_log_probs_BT = read_log_probs(log_probs_BTV, self._ids_BT, self._counts_BT, next_log_probs)
        log_likelihoods_BT = token_log_probs_BT.cumsum(dim=1)
        if self._before.log_likelihoods:
            log_likelihoods_BT = log_likelihoods_BT + self._before.log_likelihoods[member][:, None]
        self._log_likelihoods.append(log_likelihoods_BT[:, -1])
        self._next_log_probs.append(log_probs_BTV[:, -1])
        self._evidence.append(log_likelihoods_BT if self._kind == "prefix" else token_log_probs_BT)
        return self._log_prior_K[member] + self._evidence[-1]

    def finish(self) -> tuple[Tensor, Tensor | None]:
        import torch

        joint_KBT = self._log_prior_K[:, None, None] + torch.stack(self._evidence)
        return joint_KBT.log_softmax(dim=0).permute(1, 2, 0), joint_KBT.logsumexp(dim=0)

    def state(self) -> Evidence:
        return Evidence(tuple(self._log_likelihoods), tuple(self._next_log_probs))


def read_log_probs(
    log_probs_BTV: Tensor, ids_BT: Tensor, counts_BT: Tensor, next_log_probs_BV: Tensor | None
) -> Tensor:
    """Return a member's log-probability of each token that it reads, (B, T); 0 where `counts_BT` is 0.

    `next_log_probs_BV` are its predictions of the first of them; None if no text comes before.
    """
    import torch

    token_log_probs_BT = torch.zeros_like(counts_BT)
    token_log_probs_BT[:, 1:] = log_probs_BTV[:, :-1].gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    if next_log_probs_BV is not None:
        token_log_probs_BT[:, :1] = next_log_probs_BV.gather(-1, ids_BT[:, :1])
    return token_log_probs_BT * counts_BT
