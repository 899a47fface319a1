"""REPLUG against float64 without cache, batch and padding; its commands, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_decoding import beam_search, double_model, greedy, last_logits

from expertctl import Sampling, UserError
from expertctl.core.models.decoding.opening import OpenedDecoder
from expertctl.core.models.generation import continue_prompts
from expertctl.core.models.loading import load_model
from expertctl.core.testing import tiny_model_folder
from expertctl.experts.retrieval.index import Found
from expertctl.experts.retrieval.passages import Passage
from expertctl.plugins.decoders.replug.model import DocumentsModel
from expertctl.plugins.decoders.replug.retriever import Document, Retriever
from expertctl.workspace import Workspace

PROMPTS = ("The fox", "def area(width, height): whereas", "x", "Größe, façade")
COUNT = 5
DOCUMENTS = ([5, 6, 7, 8], [9, 10], [11, 12, 13])
WEIGHTS = (0.6, 0.3, 0.1)


def find(texts: Sequence[Sequence[int]]) -> list[list[Document]]:
    """Texts find documents by their length: none, one or all."""
    everything = [Document(tuple(tokens), math.log(weight)) for tokens, weight in zip(DOCUMENTS, WEIGHTS, strict=True)]
    only = [Document(tuple(DOCUMENTS[1]), 0.0)]
    return [[] if len(text) == 1 else only if len(text) % 2 else everything for text in texts]


@pytest.fixture(scope="module", params=["olmo2", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / request.param, request.param)


def naive(folder: Path, prompt: Sequence[int]) -> Callable[[Sequence[int]], torch.Tensor]:
    model = double_model(folder)
    rows = [(list(row.tokens), math.exp(row.log_weight)) for row in find([prompt])[0]] or [([], 1.0)]

    def scores(text: Sequence[int]) -> torch.Tensor:
        terms = [weight * last_logits(model, [*document, *text]).softmax(-1) for document, weight in rows]
        return torch.stack(terms).sum(dim=0).log()

    return scores


@pytest.mark.parametrize("beams", [1, 3])
def test_batches_with_padding_continue_as_each_text_does_by_the_papers_formula(folder: Path, beams: int) -> None:
    model, tokenizer = load_model(folder, dtype="float32")
    opened = OpenedDecoder(DocumentsModel(model, find, document_tokens=8, stride=4))
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    sampling = Sampling(COUNT, temperature=0, beams=beams)
    together = continue_prompts(opened, tokenizer, prompts, sampling)
    for prompt, continuation in zip(prompts, together, strict=True):
        scores = naive(folder, prompt)
        expected = greedy(scores, prompt, COUNT) if beams == 1 else beam_search(scores, prompt, COUNT, beams)
        assert continuation == expected
        assert continue_prompts(opened, tokenizer, [prompt], sampling)[0] == expected


def test_distributions_are_those_of_the_formula_with_and_without_cache(folder: Path) -> None:
    model, tokenizer = load_model(folder, dtype="float32")
    wrapped = DocumentsModel(model, find, document_tokens=8, stride=4)
    prompt = tokenizer(PROMPTS[1])["input_ids"]
    scores = naive(folder, prompt)
    with torch.inference_mode():
        first = wrapped(torch.tensor([prompt]), use_cache=True)
        second = wrapped(
            torch.tensor([[3]]),
            torch.ones(1, len(prompt) + 1),
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    for output, text in ((first, prompt), (second, [*prompt, 3])):
        torch.testing.assert_close(output.logits[0, -1].double(), scores(text), atol=1e-5, rtol=0)


def test_scored_text_has_documents_that_only_the_text_before_them_finds(folder: Path) -> None:
    """Each stride of 4 tokens is scored behind what all tokens before it find."""
    model, _ = load_model(folder, dtype="float32")
    wrapped = DocumentsModel(model, find, document_tokens=8, stride=4)
    text = list(range(20, 31))
    with torch.inference_mode():
        logits = wrapped(torch.tensor([text, text[::-1]])).logits
    for row, tokens in zip(logits, (text, text[::-1]), strict=True):
        for position in range(len(tokens)):
            query = tokens[: position // 4 * 4]
            # without a query there are no documents, and the text is read alone
            scores = naive(folder, query or [0])
            expected = scores(tokens[: position + 1])
            torch.testing.assert_close(row[position].log_softmax(-1).double(), expected, atol=1e-5, rtol=0)


class FixedIndex:
    """Finds the same passages for each query, and remembers the queries."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.found = [Found(Passage("law", text), 3.0 - number) for number, text in enumerate(texts)]
        self.queries: list[str] = []

    def search(self, queries: Sequence[str], count: int) -> list[list[Found]]:
        self.queries += queries
        return [self.found[:count] for _ in queries]


def retriever(folder: Path, **settings: Any) -> tuple[Retriever, FixedIndex]:
    model, tokenizer = load_model(folder, dtype="float32")
    index: Any = FixedIndex(["The court of the first instance", "A fox in the wood", "whereas the parties"])
    options = {"count": 2, "tokens": 6, "query_tokens": 3, "temperature": 2.0, **settings}
    return Retriever(index, model, tokenizer, (), **options), index


def test_a_query_is_the_end_of_a_text_and_weights_are_a_softmax_of_scores(folder: Path) -> None:
    finder, index = retriever(folder)
    ids = finder.tokenizer("whereas the fox jumps over")["input_ids"]
    (documents,) = finder.documents([ids])
    assert index.queries == [finder.tokenizer.decode(ids[-3:])]
    weights = torch.tensor([3.0, 2.0]).div(2.0).softmax(-1).tolist()
    assert [math.exp(document.log_weight) for document in documents] == pytest.approx(weights)
    assert all(len(document.tokens) <= 6 for document in documents)
    newline = tuple(finder.tokenizer("\n", add_special_tokens=False)["input_ids"])
    assert all(document.tokens[-len(newline) :] == newline for document in documents)


def test_passages_are_ranked_by_how_probable_the_query_is_behind_them(folder: Path) -> None:
    finder, index = retriever(folder, candidates=3, tokens=40)
    ids = finder.tokenizer("The fox")["input_ids"]
    (documents,) = finder.documents([ids])
    model, totals = double_model(folder), {}
    query = finder.tokenizer(index.queries[0], add_special_tokens=False)["input_ids"]
    for found in index.found:
        request = f"Passage: {found.passage.text} Please write a question based on this passage.\n"
        text = finder.tokenizer(request, add_special_tokens=False)["input_ids"]
        total = 0.0
        for token in query:
            total += float(last_logits(model, text).log_softmax(-1)[token])
            text = [*text, token]
        totals[found.passage.text] = total / len(query)
    best = sorted(totals, key=lambda text: -totals[text])[:2]
    shown = [finder.tokenizer.decode(document.tokens).strip() for document in documents]
    assert shown == [finder.tokenizer.decode(finder.tokenizer(text)["input_ids"]).strip() for text in best]
    ratio = documents[0].log_weight - documents[1].log_weight
    assert ratio == pytest.approx((totals[best[0]] - totals[best[1]]) / 2.0, abs=1e-4)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, new_workspace: Callable[..., Path]) -> Workspace:
    root = new_workspace(tmp_path_factory.mktemp("replug") / "workspace")
    folder = root / "text"
    folder.mkdir()
    documents = [f"The court of instance {number} decides on the {number}th case." for number in range(40)]
    for part, lines in (("train", documents[:20]), ("valid", documents[20:30]), ("test", documents[30:])):
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"{part}.jsonl").write_text(content, encoding="utf-8")
    (root / "expertctl.yaml").write_text("training: {sequence_length: 16}\ndomains: {text: {path: text}}\n")
    workspace = Workspace(root)
    workspace.data.index("library")
    workspace.merge("forest", method="ensemble", options={"prior": "uniform"})
    return workspace


OPTIONS = {"index": "library", "documents": 2, "document_tokens": 24}


@pytest.mark.parametrize("model", ["code", "forest"])
def test_a_model_generates_and_is_scored_with_an_index(workspace: Workspace, model: str) -> None:
    arguments: dict[str, Any] = {"decoder": "replug", "decoder_options": OPTIONS}
    prompts = ["The court of instance 7", "no such"]
    plain = workspace.generate_batch(model, prompts, Sampling(4, temperature=0))
    found = workspace.generate_batch(model, prompts, Sampling(4, temperature=0), **arguments)
    assert found[0].text != plain[0].text
    assert found[1].text == plain[1].text  # nothing is found for it
    bits = [
        workspace.evaluate(model, domains=["text"], context=32, **chosen).scores[model]["text"].values["bits_per_byte"]
        for chosen in ({}, {"decoder": "replug", "decoder_options": {**OPTIONS, "stride": 8}})
    ]
    assert bits[0] != bits[1]
    assert all(0 < value < 20 for value in bits)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "give index=NAME"),
        ({"index": "libary"}, "no index 'libary'.*did you mean 'library'"),
        ({"index": "library", "documents": 0}, "documents is 0"),
        ({"index": "library", "candidates": 2}, "at least as many as documents"),
        ({"index": "library", "document_tokens": 200}, "documents of 200 tokens leave 0 of the model's 128 positions"),
    ],
)
def test_what_does_not_fit_is_one_line(workspace: Workspace, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        workspace.generate("code", "x", Sampling(2), decoder="replug", decoder_options=options)
    assert "\n" not in str(caught.value)
