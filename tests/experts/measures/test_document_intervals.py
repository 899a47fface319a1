"""Intervals of bits per byte: the loss of each document against one computed document by document."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertctl import UserError, Workspace, load_model
from expertctl.core.text.conversation_blocks import windows_of
from expertctl.core.text.token_store import EncodedDocument, TokenStore, write_conversations
from expertctl.experts.measures.document_intervals import DomainIntervals, Units, scored_tokens

TEXTS = [f"Document {number} is wrapped at {'the width ' * (number % 3)}é {number * number}." for number in range(12)]


@pytest.fixture
def workspace(project: Workspace) -> Workspace:
    """A project with a domain whose test text has twelve short documents."""
    write_domain(project, "many", TEXTS)
    return Workspace(project.root)


def write_domain(project: Workspace, name: str, texts: list[str]) -> None:
    for part in ("train", "valid", "test"):
        lines = "".join(
            json.dumps({"text": text}) + "\n" for text in (texts if part == "test" else [part, f"{part} 2"])
        )
        (project.root / "text" / f"{name}-{part}.jsonl").write_text(lines, encoding="utf-8")
    content = json.loads((project.root / "expertctl.yaml").read_text())
    content["domains"][name] = {part: f"text/{name}-{part}.jsonl" for part in ("train", "valid", "test")}
    (project.root / "expertctl.yaml").write_text(json.dumps(content))


def test_units_are_documents_with_their_bits_and_bytes(workspace: Workspace) -> None:
    table = workspace.evaluate("seed", domains=["many"], context=2048 // 16, intervals=True)
    assert table.intervals is not None
    units = table.intervals.units["seed"]["many"]
    assert units is not None
    assert units.kind == "documents"
    assert units.sizes.tolist() == [len(text.encode()) for text in TEXTS]
    assert units.bits.sum() / units.sizes.sum() == pytest.approx(table.scores["seed"]["many"].values["bits_per_byte"])


def test_the_loss_of_a_document_is_that_of_its_tokens(workspace: Workspace) -> None:
    """One window holds all text: a loop over its tokens in float64 gives the bits of each document."""
    texts = [text[:8] for text in TEXTS]
    write_domain(workspace, "short", texts)
    made = Workspace(workspace.root)
    folder = made.layout.seed
    model, tokenizer = load_model(folder, dtype="float64")
    end = tokenizer.eos_token_id
    ids, owners = [end], [-1]
    for number, text in enumerate(texts):
        own = tokenizer(text)["input_ids"]
        ids += [*own, end]
        owners += [number] * len(own) + [-1]
    longest = model.config.max_position_embeddings
    assert len(ids) <= longest
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    expected = [0.0] * len(texts)
    for place in range(1, len(ids)):
        if owners[place] >= 0:
            loss = logits[place - 1].logsumexp(dim=0) - logits[place - 1, ids[place]]
            expected[owners[place]] += float(loss) / math.log(2)
    table = made.evaluate("seed", domains=["short"], context=longest, intervals=True)
    assert table.intervals is not None
    units = table.intervals.units["seed"]["short"]
    assert units is not None
    assert units.bits.tolist() == pytest.approx(expected, rel=1e-4)


def test_figures_do_not_change_with_intervals(workspace: Workspace) -> None:
    plain = workspace.evaluate("seed", domains=["many", "prose"])
    with_them = workspace.evaluate("seed", domains=["many", "prose"], intervals=True)
    content = with_them.as_json()
    for domain in ("many", "prose"):
        assert plain.scores["seed"][domain].values == with_them.scores["seed"][domain].values
    models: Any = content["models"]
    intervals = models["seed"].pop("intervals")
    content.pop("differences")
    assert content == plain.as_json()
    assert intervals["domains"]["many"]["units"] == "documents"
    assert intervals["domains"]["prose"]["units"] == "windows"
    assert intervals["domains"]["many"]["low"] < intervals["domains"]["many"]["value"]
    assert intervals["domains"]["many"]["value"] < intervals["domains"]["many"]["high"]


def test_models_are_paired_on_documents_whatever_their_tokenizers() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(50, 500, size=40).astype(float)
    hard = random.uniform(1, 4, size=40)
    left = Units("documents", sizes * (hard + 0.1), sizes)
    right = Units("documents", sizes * hard, sizes)
    scores = {"a": {"x": float(left.bits.sum() / sizes.sum())}, "b": {"x": float(right.bits.sum() / sizes.sum())}}
    intervals = DomainIntervals(scores, {"a": {"x": left}, "b": {"x": right}})
    difference, own = intervals.difference("a", "b"), intervals.of("a", "x")
    assert difference is not None
    assert own is not None
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert own.high - own.low > 0.2
    windows = Units("windows", sizes * hard, sizes)
    apart = DomainIntervals(scores, {"a": {"x": left}, "b": {"x": windows}})
    assert apart.difference("a", "b") is None
    few = DomainIntervals(scores, {"a": {"x": None}, "b": {"x": right}})
    assert few.difference("a", "b") is few.of("a", "x") is few.mean("a") is None


def test_the_mean_over_domains_is_that_of_independent_ones() -> None:
    random = np.random.default_rng(1)
    units = {name: Units("documents", random.normal(200, 20, size=100), np.full(100, 100.0)) for name in ("x", "y")}
    scores = {name: float(own.bits.sum() / own.sizes.sum()) for name, own in units.items()}
    intervals = DomainIntervals({"a": scores}, {"a": units})
    mean, alone = intervals.mean("a"), intervals.of("a", "x")
    assert mean is not None
    assert alone is not None
    assert mean.value == pytest.approx(sum(scores.values()) / 2)
    assert (mean.high - mean.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(0.5), rel=0.15)


@pytest.mark.parametrize("has_pairs", [False, True])
def test_scored_tokens_are_those_of_windows(has_pairs: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    documents = []
    for number in range(8):
        ids = random.integers(2, 30, size=int(random.integers(2, 40))).tolist()
        counted = (random.random(len(ids)) < 0.5).tolist()
        documents.append(
            EncodedDocument("text", ids, counted=counted, counted_text="x", is_rejected=has_pairs and number % 2 == 1)
        )
    write_conversations(tmp_path, documents, markers=[0, 5], vocabulary=30)
    store = TokenStore(tmp_path)
    tokens, owners = scored_tokens(store)
    expected: list[int] = []
    for batch in windows_of(store, 16, 8).batches(3):
        for row, scored in zip(batch.tokens[:, 1:], batch.scored, strict=True):
            expected += row[scored].tolist()
    assert tokens.tolist() == expected
    assert (np.diff(owners) >= 0).all()


def test_what_has_no_intervals_is_refused(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="leave out either them or the loss by position"):
        workspace.evaluate("seed", domains=["many"], by_position=8, intervals=True)
