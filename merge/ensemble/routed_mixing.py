"""Mixers whose weights depend on the text alone, not on the members' predictions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.hooks.ensembles import MixingPass, TextMixer, TextState

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class RoutedTexts:
    """The state of each row of a batch."""

    rows: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def select_rows(self, rows: Sequence[int]) -> RoutedTexts:
        return RoutedTexts(tuple(self.rows[row] for row in rows))

    def append_rows(self, other: RoutedTexts) -> RoutedTexts:
        """Return the states of a batch with the rows of both."""
        return RoutedTexts((*self.rows, *other.rows))


class RoutedMixer(TextMixer):
    """A mixer that computes the weights from the text before the members read it; members with weight 0 do not run."""

    @abstractmethod
    def route(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, texts: Sequence[Any] | None = None
    ) -> tuple[Tensor, Sequence[Any]]:
        """Return normalised log weights after every token, (B, T, K), and the state of each row; skip masked tokens."""

    def begin(self, ids_BT: Tensor, mask_BT: Tensor | None, counts_BT: Tensor, state: TextState | None) -> MixingPass:
        weights_BTK, texts = self.route(ids_BT, mask_BT, state.rows if isinstance(state, RoutedTexts) else None)
        return _RoutedPass(weights_BTK, RoutedTexts(tuple(texts)))

    def joint_log_probs(self, members: Sequence[nn.Module], tokens_BT1: Tensor, *, adapt: bool) -> Tensor:
        import torch

        from ...core.models.scoring import token_log_probs

        joint_KBT = self.route(tokens_BT1[:, :-1])[0].permute(2, 0, 1).contiguous()
        for index, member in enumerate(members):
            if not bool((joint_KBT[index] == -torch.inf).all()):
                joint_KBT[index] += token_log_probs(member, tokens_BT1)
        return joint_KBT


class _RoutedPass(MixingPass):
    """Weights that were computed before the members run."""

    def __init__(self, log_weights_BTK: Tensor, texts: RoutedTexts) -> None:
        self._log_weights_BTK, self._texts = log_weights_BTK, texts

    def is_skipped(self, member: int, kept: slice) -> bool:
        return bool((self._log_weights_BTK[:, kept, member] == -float("inf")).all())

    def log_weights(self, member: int, log_probs_BTV: Tensor) -> Tensor:
        return self._log_weights_BTK[:, :, member]

    def finish(self) -> tuple[Tensor, Tensor | None]:
        return self._log_weights_BTK, None

    def state(self) -> RoutedTexts:
        return self._texts
