"""In-Context Pretraining (arXiv:2310.10638): related documents share context windows."""

from __future__ import annotations

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.text import DocumentOrder
from ...experts.text.in_context_order import in_context_order


@hookimpl
def document_orders() -> list[DocumentOrder]:
    return [DocumentOrder("in_context", "each document beside those that are most like it", in_context_order)]
