"""Tuning an embedding model for a language model: the loss against a naive computation, and what it changes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_decoding import double_model, last_logits
from transformers import AutoModel, AutoTokenizer

from expertctl import UserError
from expertctl.core.testing import tiny_model_folder
from expertctl.experts.measures.embedder import SentenceEmbedder
from expertctl.experts.retrieval.index import read_index
from expertctl.experts.retrieval.passages import Passage, Passages, write_passages
from expertctl.experts.retrieval.tuning import Question, Reader, RetrieverTuning, divergence, tune_embedder
from expertctl.workspace import Workspace

TUNING = RetrieverTuning(steps=24, queries=4, candidates=3, learning_rate=3e-3)


@pytest.fixture
def passages(tmp_path: Path) -> Passages:
    write_passages(
        tmp_path, [Passage("law", f"The court {n} decides on case {n * 7}, and {n} appeals.") for n in range(9)]
    )
    return Passages(tmp_path)


def test_the_loss_is_the_divergence_of_what_the_reader_gains_from_the_cosines(tmp_path: Path) -> None:
    embedder = tiny_model_folder(tmp_path / "embedder")
    folder = tiny_model_folder(tmp_path / "reader", seed=1)
    question = Question("The court", " decides", ("A fox", "whereas the case", "x"))
    tokenizer: Any = AutoTokenizer.from_pretrained(embedder)
    loss = divergence(AutoModel.from_pretrained(embedder).eval(), tokenizer, Reader.of_folder(folder), question)

    reader, ids = double_model(folder), AutoTokenizer.from_pretrained(folder)
    gains = []
    for document in question.documents:
        text = [
            *ids(document, add_special_tokens=False)["input_ids"],
            *ids("\nThe court", add_special_tokens=False)["input_ids"],
        ]
        target = ids(" decides", add_special_tokens=False)["input_ids"]
        total = 0.0
        for token in target:
            total += float(last_logits(reader, text).log_softmax(-1)[token])
            text = [*text, token]
        gains.append(total / len(target) / 0.1)
    vectors = torch.from_numpy(SentenceEmbedder(embedder)([question.query, *question.documents])).double()
    cosines = torch.nn.functional.cosine_similarity(vectors[1:], vectors[:1], dim=-1) / 0.1
    wanted, got = torch.tensor(gains).softmax(-1).tolist(), cosines.softmax(-1).tolist()
    expected = sum(q * math.log(q / p) for q, p in zip(wanted, got, strict=True))
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-4)


def test_the_loss_falls_and_the_same_tuning_gives_the_same_model(passages: Passages, tmp_path: Path) -> None:
    embedder = tiny_model_folder(tmp_path / "embedder")
    reader = Reader.of_folder(tiny_model_folder(tmp_path / "reader", seed=1))
    losses = tune_embedder(embedder, passages, reader, tmp_path / "tuned", TUNING)
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert tune_embedder(embedder, passages, reader, tmp_path / "again", TUNING) == losses
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("embedder", "tuned", "again")]
    assert weights[0] != weights[1] == weights[2]


def test_too_few_passages_are_refused(passages: Passages, tmp_path: Path) -> None:
    embedder = tiny_model_folder(tmp_path / "embedder")
    with pytest.raises(UserError, match="9 passages are too few"):
        tune_embedder(embedder, passages, Reader.of_folder(embedder), tmp_path / "tuned", RetrieverTuning(candidates=9))


def test_an_index_keeps_the_tuned_model(new_workspace: Any, tmp_path: Path) -> None:
    root = new_workspace(tmp_path / "workspace")
    for part in ("train", "valid"):
        lines = [f"The {part} text of court {number}." for number in range(20)]
        (root / f"{part}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (root / "expertctl.yaml").write_text("domains: {text: {train: train.jsonl, valid: valid.jsonl}}\n")
    workspace, embedder = Workspace(root), tiny_model_folder(tmp_path / "embedder")
    with pytest.raises(UserError, match="name one with --embedder"):
        workspace.data.index("library", ["text"], tune_for="code")
    workspace.data.index("library", ["text"], embedder=embedder, tune_for="code", tuning=TUNING)
    folder = workspace.layout.indexes / "library"
    assert read_index(folder).tuned_for == "code"
    assert (folder / "embedder" / "model.safetensors").read_bytes() != (embedder / "model.safetensors").read_bytes()
    assert len(workspace.data.search("library", "court 7", 3)) == 3
