"""The members with the largest posterior, chosen again and again while a text is read.

Before the first choice, all members have a weight. Between choices, members that are not chosen for any row of a batch do
not run; before the next one they read what they have skipped, all tokens at once.
Shapes: K = active members, B = batch, T = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core.hooks.ensembles import MixingPass
from ...core.models.kernels.posterior import PosteriorKind, top_mask
from .posterior_pass import read_log_probs

if TYPE_CHECKING:
    from torch import Tensor


def chosen_only(
    log_weights_KBT: Tensor, is_choice_BT: Tensor, top_k: int, before_KB: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return normalised log weights of the chosen members, (K, B, T), and which they are after the last token, (K, B).

    Choices are made by the weights where `is_choice_BT`; before the first of them, `before_KB` applies (None: all members).
    """
    import torch

    numbers = torch.arange(is_choice_BT.shape[1], device=is_choice_BT.device)
    last_choice_BT = torch.where(is_choice_BT, numbers, -1).cummax(dim=1).values
    source_KBT = last_choice_BT.clamp(min=0).expand(log_weights_KBT.shape)
    chosen_KBT = top_mask(log_weights_KBT, top_k).gather(2, source_KBT)
    earlier_KBT = torch.ones_like(chosen_KBT) if before_KB is None else before_KB[..., None].expand(chosen_KBT.shape)
    chosen_KBT = torch.where(last_choice_BT >= 0, chosen_KBT, earlier_KBT)
    return log_weights_KBT.masked_fill(~chosen_KBT, -torch.inf).log_softmax(dim=0), chosen_KBT[..., -1]


@dataclass(frozen=True)
class ChosenEvidence:
    """The members chosen for the texts of a batch, and each member's predictions for what it has read of them."""

    log_likelihoods: tuple[Tensor, ...]
    """Log-likelihood of what a member has read, (B,) per member."""
    next_log_probs: tuple[Tensor, ...]
    """Its predictions of the token after that, (B, V) per member."""
    chosen: Tensor
    """Whether a member has a weight until the next choice, (K, B)."""
    num_tokens: Tensor
    """Number of tokens so far that were predicted from one before them, (B,)."""
    unread_ids: Tensor
    """The latest tokens, (B, T), of which each member may have skipped the last ones."""
    unread_counts: Tensor
    """1 for those that count as evidence, else 0."""

    def __len__(self) -> int:
        return len(self.num_tokens)

    def select_rows(self, rows: Sequence[int]) -> ChosenEvidence:
        chosen = list(rows)
        return ChosenEvidence(
            tuple(tensor[chosen] for tensor in self.log_likelihoods),
            tuple(tensor[chosen] for tensor in self.next_log_probs),
            self.chosen[:, chosen],
            self.num_tokens[chosen],
            self.unread_ids[chosen],
            self.unread_counts[chosen],
        )


class TopExpertsPass(MixingPass):
    """The weights of one forward pass with some members at a time."""

    needs_all_members = True

    def __init__(
        self,
        log_prior_K: Tensor,
        ids_BT: Tensor,
        counts_BT: Tensor,
        before: ChosenEvidence | None,
        kind: PosteriorKind,
        top_k: int,
        every: int,
    ) -> None:
        import torch

        self._log_prior_K, self._ids_BT, self._counts_BT = log_prior_K, ids_BT, counts_BT
        self._before, self._kind, self._top_k = before, kind, top_k
        num_before = 0 if before is None else before.num_tokens[:, None]
        num_tokens_BT = num_before + counts_BT.cumsum(dim=1)
        self._num_tokens_B = num_tokens_BT[:, -1]
        self._is_choice_BT = (counts_BT > 0) & (num_tokens_BT % every == 0)
        self._has_choice = bool(self._is_choice_BT.any())
        self._evidence_KBT = torch.full((len(log_prior_K), *counts_BT.shape), -torch.inf, device=counts_BT.device)
        """Evidence after each token; that of skipped members stays -inf."""
        self._log_likelihoods: list[Tensor | None] = [None] * len(log_prior_K)
        self._next_log_probs: list[Tensor | None] = [None] * len(log_prior_K)

    def is_skipped(self, member: int, kept: slice) -> bool:
        return self._before is not None and not self._has_choice and not bool(self._before.chosen[member].any())

    def log_weights(self, member: int, log_probs_BTV: Tensor) -> Tensor:
        num_new = self._ids_BT.shape[1]
        num_skipped = log_probs_BTV.shape[1] - num_new
        ids, counts = self._read(num_skipped)
        before = self._before
        token_log_probs = read_log_probs(
            log_probs_BTV, ids, counts, None if before is None else before.next_log_probs[member]
        )
        log_likelihoods = token_log_probs.cumsum(dim=1)
        if before is not None:
            log_likelihoods = log_likelihoods + before.log_likelihoods[member][:, None]
        self._log_likelihoods[member] = log_likelihoods[:, -1]
        self._next_log_probs[member] = log_probs_BTV[:, -1]
        evidence = log_likelihoods if self._kind == "prefix" else token_log_probs
        self._evidence_KBT[member] = evidence[:, num_skipped:]
        return self._log_prior_K[member] + self._evidence_KBT[member]

    def finish(self) -> tuple[Tensor, None]:
        joint_KBT = self._log_prior_K[:, None, None] + self._evidence_KBT
        before = None if self._before is None else self._before.chosen
        log_weights_KBT, self._chosen_KB = chosen_only(joint_KBT, self._is_choice_BT, self._top_k, before)
        return log_weights_KBT.permute(1, 2, 0), None

    def state(self) -> ChosenEvidence:
        has_unread = any(tensor is None for tensor in self._log_likelihoods)
        unread, counts = self._read(None if has_unread else 0)
        first = 0 if has_unread else unread.shape[1]
        return ChosenEvidence(
            tuple(self._carried("log_likelihoods", self._log_likelihoods)),
            tuple(self._carried("next_log_probs", self._next_log_probs)),
            self._chosen_KB,
            self._num_tokens_B,
            unread[:, first:],
            counts[:, first:],
        )

    def _read(self, num_skipped: int | None) -> tuple[Tensor, Tensor]:
        """Return the ids and counts of the last `num_skipped` tokens (None: all that a member may have skipped) and of these."""
        import torch

        if self._before is None:
            return self._ids_BT, self._counts_BT
        ids, counts = self._before.unread_ids, self._before.unread_counts
        first = 0 if num_skipped is None else ids.shape[1] - num_skipped
        return torch.cat([ids[:, first:], self._ids_BT], dim=1), torch.cat([counts[:, first:], self._counts_BT], dim=1)

    def _carried(self, name: str, new: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the members' new values, and the earlier ones of those that were skipped."""
        return [value if value is not None else getattr(self._before, name)[member] for member, value in enumerate(new)]
