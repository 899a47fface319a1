"""Indexes: passages, the two searches against naive computations, and what a damaged or missing index says."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertctl import UserError
from expertctl.core.testing import tiny_model_folder
from expertctl.core.text.word_search import best, words_of
from expertctl.experts.measures.embedder import SentenceEmbedder
from expertctl.experts.retrieval.index import Index
from expertctl.experts.retrieval.passages import Passage, Passages, split_text, write_passages
from expertctl.workspace import Workspace

DOCUMENTS = (
    "The court decides on the case of the fox.\n\nThe fox appeals.",
    "A recipe: take flour, water and salt; bake the bread.",
    "白日依山尽，黄河入海流。",
    "The bread of the court is baked in the court.",
)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    root = tmp_path / "workspace"
    (root / "text").mkdir(parents=True)
    for part in ("train", "valid"):
        lines = DOCUMENTS if part == "train" else ["The secret of validation."] * 2
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (root / "text" / f"{part}.jsonl").write_text(content, encoding="utf-8")
    chat = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}] * 3
    (root / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chat))
    (root / "expertctl.yaml").write_text("domains: {text: {path: text}, chats: {path: chat.jsonl, format: chat}}\n")
    return Workspace(root)


@given(st.text(max_size=400), st.integers(1, 60))
def test_passages_are_the_text_but_for_white_space_between_them(text: str, characters: int) -> None:
    pieces = list(split_text(text, characters))
    assert all(0 < len(piece) <= characters and piece == piece.strip() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_passages_end_where_paragraphs_and_sentences_do() -> None:
    text = "One sentence. Another one is here.\n\nA paragraph of its own, longer than the limit."
    assert list(split_text(text, 40)) == [
        "One sentence. Another one is here.",
        "A paragraph of its own, longer than the",
        "limit.",
    ]


def test_passages_are_read_by_number(tmp_path: Path) -> None:
    written = [Passage("law", "façade\nnext"), Passage("news", "\ud800 half a pair"), Passage("law", "")]
    write_passages(tmp_path, written)
    passages = Passages(tmp_path)
    assert list(passages) == written
    with pytest.raises(IndexError):
        passages[3]
    with (tmp_path / "passages.jsonl").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="damaged"):
        Passages(tmp_path)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1), st.integers(1, 5))
def test_the_best_are_the_first_of_a_stable_sort(scores: list[float], count: int) -> None:
    expected = sorted(range(len(scores)), key=lambda number: -scores[number])[:count]
    assert [ranked.number for ranked in best(np.array(scores), count)] == expected


def test_a_search_by_words_has_the_scores_of_bm25(workspace: Workspace) -> None:
    """Robertson's formula with Lucene's idf, k1 1.5, b 0.75."""
    workspace.data.index("library", ["text"])
    found = {one.passage.text: one.score for one in workspace.data.search("library", "the BREAD court", 10)}
    passages = [words_of(text) for text in DOCUMENTS]
    mean = sum(map(len, passages)) / len(passages)
    expected = {}
    for text, words in zip(DOCUMENTS, passages, strict=True):
        counts, score = Counter(words), 0.0
        for word in ("the", "bread", "court"):
            having = sum(word in other for other in passages)
            idf = math.log(1 + (len(passages) - having + 0.5) / (having + 0.5))
            score += idf * counts[word] / (counts[word] + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean))
        if score:
            expected[text] = score
    assert found == pytest.approx(expected, rel=1e-5)
    assert next(iter(found)) == DOCUMENTS[3]


def test_text_without_spaces_is_found_by_its_characters_and_unknown_words_find_nothing(workspace: Workspace) -> None:
    workspace.data.index("library", ["text"])
    assert [one.passage.text for one in workspace.data.search("library", "黄河")] == [DOCUMENTS[2]]
    assert workspace.data.search("library", "zebra ...") == []
    assert workspace.data.search("library", "secret validation") == []  # only training text is in an index


def test_a_search_by_embeddings_has_the_highest_cosines_and_needs_no_other_folder(
    workspace: Workspace, tmp_path: Path
) -> None:
    embedder = tiny_model_folder(tmp_path / "embedder")
    embed = SentenceEmbedder(embedder)
    vectors, query = embed(DOCUMENTS).astype(np.float64), embed(["the bread"]).astype(np.float64)[0]
    workspace.data.index("library", ["text"], embedder=embedder)
    for file in embedder.iterdir():
        file.unlink()
    found = workspace.data.search("library", "the bread", 4)
    cosines = {
        text: float(vector @ query / np.linalg.norm(vector) / np.linalg.norm(query))
        for text, vector in zip(DOCUMENTS, vectors, strict=True)
    }
    assert {one.passage.text: one.score for one in found} == pytest.approx(cosines, abs=1e-5)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_the_same_text_gives_the_same_bytes(workspace: Workspace) -> None:
    first = workspace.data.index("library", ["text"])
    assert workspace.data.index("library", ["text"], force=True) == first


def test_what_cannot_be_indexed_is_one_line(workspace: Workspace, tmp_path: Path) -> None:
    for arguments, reason in (
        ({"domains": ["txt"]}, "no domain 'txt'.*did you mean 'text'"),
        ({"domains": ["chats"]}, "an index reads plain text, and domain 'chats' holds conversations"),
        ({"domains": ["text"], "embedder": tmp_path}, "not a sentence-embedding model"),
    ):
        settings: Any = arguments
        with pytest.raises(UserError, match=reason):
            workspace.data.index("library", **settings)
    with pytest.raises(UserError, match="an index cannot be called"):
        workspace.data.index("../library", ["text"])
    assert not (workspace.root / "indexes").exists()
    workspace.data.index("library", ["text"])
    with pytest.raises(UserError, match="exists already"):
        workspace.data.index("library", ["text"])


@pytest.mark.parametrize("damage", ["remove", "change"])
def test_missing_and_changed_files_are_named(workspace: Workspace, damage: str) -> None:
    workspace.data.index("library", ["text"])
    folder = workspace.layout.indexes / "library"
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "index.json"):
        kept = path.read_bytes()
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(UserError, match=path.name):
            Index(folder)
        path.write_bytes(kept)
    with pytest.raises(UserError, match=r"no index 'libary'.*did you mean 'library'"):
        workspace.data.search("libary", "x")


def test_an_embedding_model_with_other_pooling_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    embedder = tiny_model_folder(tmp_path / "embedder")
    (embedder / "1_Pooling").mkdir()
    settings = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (embedder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="use a model with mean pooling"):
        workspace.data.index("library", ["text"], embedder=embedder)
