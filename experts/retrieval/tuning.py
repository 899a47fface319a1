"""Tuning an embedding model for a language model: passages count as near that make the text after a query probable (LSR).

REPLUG LSR (arXiv:2301.12652, section 4), with Q from the mean log-probability of a token, as in the authors' code, where the
paper has the probability. Only the embedding model changes. Shapes: N = texts, T = tokens, d = width, K = candidates.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from ...core.models.scoring import continuation_log_probs
from ...core.reporting import SILENT, Reporter
from .embeddings import FILE as EMBEDDINGS
from .embeddings import Embeddings, build_embeddings
from .passages import Passages

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARPNESS = 0.1
"""Temperature of both distributions over candidates, as in the paper."""


@dataclass(frozen=True)
class RetrieverTuning:
    """Settings of a tuning; those of the paper are 25,000 steps of 64 queries with 20 candidates."""

    steps: int = 200
    queries: int = 8
    candidates: int = 8
    learning_rate: float = 2e-5
    seed: int = 0


@dataclass(frozen=True)
class Reader:
    """The language model that reads what is found."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    begin: tuple[int, ...] = ()
    """Tokens that the tokenizer puts before a text."""

    @classmethod
    def of_folder(cls, folder: Path) -> Reader:
        """Load the language model and the tokenizer of a folder."""
        from ...core.models.decoding.wrapped import tokens_before_text
        from ...core.models.loading import load_network, tokenizer_folder
        from ...core.text.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(tokenizer_folder(folder))
        return cls(load_network(folder, dtype="float32").eval(), tokenizer, tokens_before_text(tokenizer))

    def log_probs(self, documents: Sequence[str], query: str, continuation: str) -> list[float]:
        """Return the mean log-probability of a token of the continuation behind each document and the query.

        Documents are cut to the model's positions; raises `UserError` if a query leaves none.
        """
        from ...core.models.decoding.wrapped import positions_of

        target, end = self._ids(continuation), self._ids(f"\n{query}")
        room = positions_of(self.model) - len(self.begin) - len(end) - len(target)
        if room < 1:
            raise UserError(
                "passages are longer than the model that reads them; build the index with fewer --characters"
            )
        prefixes = [[*self.begin, *self._ids(document)[:room], *end] for document in documents]
        totals = continuation_log_probs(self.model, [(prefix, target) for prefix in prefixes])
        return [total / len(target) for total in totals]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


@dataclass(frozen=True)
class Question:
    """The halves of a passage, and the passages that the first half finds."""

    query: str
    continuation: str
    documents: tuple[str, ...]


def tune_embedder(
    folder: Path,
    passages: Passages,
    reader: Reader,
    target: Path,
    tuning: RetrieverTuning | None = None,
    reporter: Reporter = SILENT,
) -> list[float]:
    """Write the embedding model of `folder`, tuned for `reader`, to `target`; return the loss of each step.

    Queries are the first halves of passages, continuations the second; candidates are found by the model as it was.
    Raises `UserError` for fewer passages than candidates.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from ..measures.embedder import SentenceEmbedder

    tuning = tuning or RetrieverTuning()
    if len(passages) <= tuning.candidates:
        raise UserError(
            f"{len(passages)} passages are too few to tune an embedding model with {tuning.candidates} candidates for each query"
        )
    target.mkdir()
    build_embeddings(target, passages, SentenceEmbedder(folder), reporter)
    found = Embeddings(target, SentenceEmbedder(folder))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval()  # without dropout
    optimiser = torch.optim.Adam(model.parameters(), lr=tuning.learning_rate)
    order, losses = random.Random(tuning.seed), []
    for step in range(tuning.steps):
        questions = _questions(passages, found, tuning, order)
        terms = [divergence(model, tokenizer, reader, question) for question in questions]
        loss = torch.stack(terms).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        optimiser.step()
        losses.append(float(loss.detach()))
        reporter.progress("tuning the embedder", step + 1, tuning.steps, unit="steps")
    (target / EMBEDDINGS).unlink()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return losses


def divergence(model: Any, tokenizer: Any, reader: Reader, question: Question) -> Tensor:
    """Return KL(Q || P) over the documents of a question: Q by what the reader predicts, P by cosines."""
    import torch

    gains = reader.log_probs(question.documents, question.query, question.continuation)
    units_Nd = _units(model, tokenizer, [question.query, *question.documents])
    scores_K = units_Nd[1:] @ units_Nd[0]
    wanted_K = torch.tensor(gains).div(SHARPNESS).log_softmax(-1)
    return torch.nn.functional.kl_div(
        scores_K.div(SHARPNESS).log_softmax(-1), wanted_K, log_target=True, reduction="sum"
    )


def _units(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Return mean hidden states of unit length, (N, d), with gradients."""
    import torch

    rows = [tokenizer(text, truncation=True)["input_ids"] for text in texts]
    longest = max(map(len, rows))
    ids_NT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask_NT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    states_NTd = model(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
    means_Nd = (states_NTd * mask_NT[..., None]).sum(dim=1) / mask_NT.sum(dim=1, keepdim=True)
    return torch.nn.functional.normalize(means_Nd, dim=-1)


def _questions(passages: Passages, found: Embeddings, tuning: RetrieverTuning, order: random.Random) -> list[Question]:
    numbers = order.sample(range(len(passages)), min(tuning.queries, len(passages)))
    halves = [_halves(passages[number].text) for number in numbers]
    rows = found.search([query for query, _ in halves], tuning.candidates + 1)
    return [
        Question(
            query,
            continuation,
            # the passage itself holds what is to be predicted
            tuple(passages[one.number].text for one in row if one.number != number)[: tuning.candidates],
        )
        for number, (query, continuation), row in zip(numbers, halves, rows, strict=True)
    ]


def _halves(text: str) -> tuple[str, str]:
    middle = text.find(" ", len(text) // 2)
    cut = middle if middle > 0 else max(len(text) // 2, 1)
    return text[:cut], text[cut:] or text
