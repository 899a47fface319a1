"""The `in_context` document order of In-Context Pretraining (arXiv:2310.10638)."""

from __future__ import annotations

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.text import DocumentOrder
from ...experts.text.in_context_order import in_context_order


@hookimpl
def document_orders() -> list[DocumentOrder]:
    summary = "similar documents adjacent, so that they share context windows"
    return [DocumentOrder("in_context", summary, in_context_order)]
