"""From a text to the documents that are read before it, with their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....core.models.scoring import continuation_log_probs
from ....experts.retrieval.index import Found, Index

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REQUEST = "Passage: {passage} Please write a question based on this passage.\n"
"""What is read before the query when passages are ranked by it (arXiv:2204.07496, section 2.2)."""


@dataclass(frozen=True)
class Document:
    """A document in tokens, and the logarithm of its weight."""

    tokens: tuple[int, ...]
    log_weight: float


@dataclass(frozen=True)
class Retriever:
    """Finds documents for texts in tokens.

    Weights are the softmax of scores / `temperature`. With `candidates`, as many are found, and the language model ranks
    them by the mean log p(query | passage) (UPR, arXiv:2204.07496), whose scores then give the weights.
    """

    index: Index
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    begin: tuple[int, ...]
    """Tokens that the tokenizer puts before a text."""
    count: int
    """Most documents for a text."""
    tokens: int
    """Most tokens of a document."""
    query_tokens: int
    """A query is the end of the text, at most as many tokens."""
    temperature: float
    candidates: int = 0
    separator: str = "\n"
    """Text between a document and the text."""

    def documents(self, texts: Sequence[Sequence[int]]) -> list[list[Document]]:
        """Return the documents of each text, best first; none for a text that finds nothing."""
        queries = [self._text(ids[-self.query_tokens :]) for ids in texts]
        rows = self.index.search(queries, max(self.count, self.candidates))
        if self.candidates:
            rows = [self._ranked(query, row) for query, row in zip(queries, rows, strict=True)]
        return [self._weighted(row[: self.count]) for row in rows]

    def _ranked(self, query: str, row: Sequence[Found]) -> list[Found]:
        target = self._ids(query)
        if not target:
            return list(row)
        limit = self.tokens
        prefixes = [
            [*self.begin, *self._ids(REQUEST.format(passage=self._text(self._ids(found.passage.text)[:limit])))]
            for found in row
        ]
        totals = continuation_log_probs(self.model, [(prefix, target) for prefix in prefixes])
        ranked = [Found(found.passage, total / len(target)) for found, total in zip(row, totals, strict=True)]
        return sorted(ranked, key=lambda found: -found.score)

    def _weighted(self, row: Sequence[Found]) -> list[Document]:
        if not row:
            return []
        scores = [found.score / self.temperature for found in row]
        highest = max(scores)
        total = highest + math.log(sum(math.exp(score - highest) for score in scores))
        end = self._ids(self.separator)
        return [
            Document((*self._ids(found.passage.text)[: self.tokens - len(end)], *end), score - total)
            for found, score in zip(row, scores, strict=True)
        ]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
