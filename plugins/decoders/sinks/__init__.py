"""Attention sinks: the first tokens and a sliding window of the last ones, for endless text (arXiv:2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....core.hooks.evaluation import Decoder, DecoderInputs
from ....core.hooks.hookspecs import hookimpl
from ....core.hooks.option_checks import check_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SinksOptions:
    """Options of attention sinks."""

    sinks: int = 4
    """First tokens of a text that are kept; 0: a plain sliding window."""
    window: int | None = None
    """Last tokens that are kept, with the one being read (default: the rest of the model's positions)."""

    def __post_init__(self) -> None:
        check_at_least("sinks", self.sinks, 0)
        if self.window is not None:
            check_at_least("window", self.window, 1)


def wrap(inputs: DecoderInputs, options: SinksOptions) -> PreTrainedModel:
    """Return the model with a cache of constant size."""
    from .model import SinksModel

    return SinksModel(inputs.model, options.sinks, options.window)


@hookimpl
def decoders() -> list[Decoder]:
    summary = "the first tokens and a sliding window of the last ones, for endless text"
    return [Decoder("sinks", summary, wrap, options=SinksOptions)]
