"""Context-aware decoding: what a document changes in the predictions counts more (arXiv:2305.14739).

softmax of (1 + alpha) z(y | context, text) - alpha z(y | text), of logits z.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import UserError
from ...core.hooks.evaluation import Decoder, DecoderInputs
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ContextOptions:
    """Options of context-aware decoding."""

    context: str | tuple[str, ...] = ""
    """The document, or one for each prompt."""
    context_file: str = ""
    """File with the document, in place of `context`."""
    alpha: float = 0.5
    """0 only puts the document before the text; 1 suits documents that contradict what the model has learnt."""

    def __post_init__(self) -> None:
        check_at_least("alpha", self.alpha, 0)
        if bool(self.context) == bool(self.context_file):
            raise ValueError("give either context or context_file, and not an empty one")
        if self.context_file and not Path(self.context_file).expanduser().is_file():
            raise ValueError(f"context_file {self.context_file} is not a file")

    def documents(self) -> tuple[str, ...]:
        """Return the document, or one for each prompt; raises `UserError` for a file that cannot be read."""
        if not self.context_file:
            return (self.context,) if isinstance(self.context, str) else self.context
        try:
            return (Path(self.context_file).expanduser().read_text(encoding="utf-8"),)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the context cannot be read from {self.context_file}: {error}") from None


def wrap(inputs: DecoderInputs, options: ContextOptions) -> PreTrainedModel:
    """Return the model that reads the text with and without the document."""
    from ...core.models.decoding.rows import DecodingRow, RowsModel
    from ...core.models.decoding.wrapped import tokens_before_text

    documents = [inputs.tokenizer(text, add_special_tokens=False)["input_ids"] for text in options.documents()]
    rows = [DecodingRow(inputs.model, 1 + options.alpha, tuple(map(tuple, documents)))]
    if options.alpha:
        rows.append(DecodingRow(inputs.model, -options.alpha))
    return RowsModel(inputs.model, rows, begin=tokens_before_text(inputs.tokenizer))


@hookimpl
def decoders() -> list[Decoder]:
    summary = "predictions with a document, against those without it"
    return [Decoder("context_aware", summary, wrap, options=ContextOptions)]
