"""REPLUG: documents that a text finds are read one by one before it, and the predictions are mixed (arXiv:2301.12652)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....core.hooks.evaluation import Decoder, DecoderInputs
from ....core.hooks.hookspecs import hookimpl
from ....core.hooks.option_checks import check_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPERATURES = {"words": 5.0, "embeddings": 0.1, "ranked": 0.1}
"""Scores are divided by it: those of BM25, cosines, and nats per token of the query."""


@dataclass(frozen=True)
class ReplugOptions:
    """Options of REPLUG."""

    index: str = ""
    """Name or folder of the index; see `expertctl index build`."""
    documents: int = 4
    """Documents for a text, each a forward pass."""
    temperature: float | None = None
    """Scores are divided by it before the softmax that gives the weights (default: by the kind of search)."""
    candidates: int = 0
    """As many are found and then ranked by how probable the text is behind each (UPR); 0: not ranked again."""
    document_tokens: int = 128
    """Most tokens of a document; they take positions of the text."""
    query_tokens: int = 64
    """The last tokens of a text, by which documents are found."""
    stride: int = 64
    """Text that is scored has other documents after as many tokens."""

    def __post_init__(self) -> None:
        if not self.index:
            raise ValueError("give index=NAME, an index of `expertctl index build`")
        for name in ("documents", "query_tokens", "stride"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("document_tokens", self.document_tokens, 8)
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError("temperature must be above 0")
        if self.candidates and self.candidates < self.documents:
            raise ValueError("candidates must be 0, or at least as many as documents")


def wrap(inputs: DecoderInputs, options: ReplugOptions) -> PreTrainedModel:
    """Return the model that reads documents before the text."""
    from ....core.models.decoding.wrapped import tokens_before_text
    from ....experts.retrieval.index import Index
    from .model import DocumentsModel
    from .retriever import Retriever

    index = Index(inputs.indexes[options.index])
    begin = tokens_before_text(inputs.tokenizer)
    scores = "ranked" if options.candidates else index.manifest.search
    retriever = Retriever(
        index,
        inputs.model,
        inputs.tokenizer,
        begin,
        options.documents,
        options.document_tokens,
        options.query_tokens,
        options.temperature or TEMPERATURES[scores],
        options.candidates,
    )
    return DocumentsModel(
        inputs.model,
        retriever.documents,
        document_tokens=options.document_tokens,
        stride=options.stride,
        begin=begin,
    )


@hookimpl
def decoders() -> list[Decoder]:
    summary = "documents of an index, read one by one before the text"
    return [Decoder("replug", summary, wrap, options=ReplugOptions, indexes=lambda options: [options.index])]
