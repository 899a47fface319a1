"""Ways to find domains other than by words: hidden states, sentence embeddings, metadata, a plugin's own."""

from __future__ import annotations

import inspect
import json
import random
import statistics
import textwrap
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, BertConfig, BertModel

from expertctl import DiscoverySettings, DomainDiscoverer, UserError, Workspace
from expertctl.core.testing import tiny_model_folder
from expertctl.experts.measures.embedder import HiddenStateEmbedder, SentenceEmbedder
from expertctl.experts.text import discovery

MODULES = {"prose": textwrap, "chance": random, "means": statistics}


def pieces(module: ModuleType) -> list[str]:
    lines = inspect.getsource(module).splitlines()
    return ["\n".join(lines[begin : begin + 8]) for begin in range(0, len(lines), 8)]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    records = [{"text": text, "from": name} for name, module in MODULES.items() for text in pieces(module)]
    random.Random(0).shuffle(records)
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "expertctl.yaml").write_text(yaml.safe_dump({"domains": {"mixed": {"path": "mixed.jsonl"}}}))
    return Workspace(tmp_path)


def texts_of(folder: Path, name: str) -> set[str]:
    return {
        json.loads(line)["text"]
        for part in ("train", "valid", "test")
        for line in (folder / name / f"{part}.jsonl").read_text().splitlines()
    }


# --- metadata ---


def test_each_value_of_a_field_becomes_a_domain(workspace: Workspace) -> None:
    discovery = workspace.discover("by", settings=DiscoverySettings(by="metadata"), field="from")
    assert {cluster.name for cluster in discovery.clusters} == {"by-prose", "by-chance", "by-means"}
    assert [cluster.documents["train"] for cluster in discovery.clusters] == sorted(
        (cluster.documents["train"] for cluster in discovery.clusters), reverse=True
    )
    for name, module in MODULES.items():
        assert texts_of(discovery.folder, f"by-{name}") == set(pieces(module))
        assert workspace.config.domains[f"by-{name}"].train == f"clusters/by/by-{name}/train.jsonl"
    about = {cluster.label: cluster.top_words for cluster in discovery.clusters}
    assert "random" in about["chance"]


def test_rare_values_share_the_last_domain_where_fewer_are_asked_for(workspace: Workspace) -> None:
    discovery = workspace.discover("by", 2, DiscoverySettings(by="metadata"), field="from")
    names = [cluster.name for cluster in discovery.clusters]
    assert names[1] == "by-other"
    kept = names[0].removeprefix("by-")
    rest = {text for name, module in MODULES.items() if name != kept for text in pieces(module)}
    assert texts_of(discovery.folder, "by-other") == rest


@pytest.mark.parametrize(
    ("lines", "settings", "said"),
    [
        ([{"text": "a b", "from": ["x"]}] * 2, {}, "'from' is a list, which cannot name a domain"),
        (
            [{"text": f"a {n}", "from": n} for n in range(90)],
            {},
            "'from' has .. values; request a number of clusters",
        ),
        (
            [{"text": f"a {n}", "from": n % 2} for n in range(90)],
            {"clusters": 3},
            "2 values, too few for 3 clusters",
        ),
    ],
)
def test_fields_that_cannot_sort_are_refused(
    workspace: Workspace, lines: list[dict[str, Any]], settings: dict[str, Any], said: str
) -> None:
    (workspace.root / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=said):
        workspace.discover("by", settings=DiscoverySettings(by="metadata"), field="from", **settings)
    assert not list((workspace.root / "clusters").glob("*"))


def test_numbers_and_truth_values_are_names_too_and_names_are_made_safe(workspace: Workspace) -> None:
    values = [3, True, "A/B ü", "a b"]
    lines = [{"text": f"some words {n}", "from": values[n % 4]} for n in range(200)]
    (workspace.root / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    discovery = workspace.discover("by", settings=DiscoverySettings(by="metadata"), field="from")
    assert {cluster.label for cluster in discovery.clusters} == {"3", "true", "a-b", "a-b-2"}


def test_text_without_records_is_refused(workspace: Workspace) -> None:
    (workspace.root / "a.txt").write_text("one")
    (workspace.root / "expertctl.yaml").write_text(
        yaml.safe_dump({"domains": {"plain": {"train": "a.txt", "valid": "a.txt"}}})
    )
    with pytest.raises(UserError, match=r"a.txt: documents of format 'text' have no field 'source'"):
        Workspace(workspace.root).discover("by", settings=DiscoverySettings(by="metadata"))


def test_parquet_has_fields_as_well(workspace: Workspace) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [json.loads(line) for line in (workspace.root / "mixed.jsonl").read_text().splitlines()]
    table = pa.table({"from": [line["from"] for line in lines], "text": [line["text"] for line in lines]})
    pq.write_table(table, workspace.root / "mixed.parquet")
    (workspace.root / "expertctl.yaml").write_text(yaml.safe_dump({"domains": {"mixed": {"path": "mixed.parquet"}}}))
    discovery = Workspace(workspace.root).discover("by", settings=DiscoverySettings(by="metadata"), field="from")
    assert texts_of(discovery.folder, "by-means") == set(pieces(statistics))
    with pytest.raises(UserError, match="no field 'author'; fields: from, text"):
        Workspace(workspace.root).discover(
            "again", settings=DiscoverySettings(domains=["mixed"], by="metadata"), field="author"
        )


# --- vectors ---


def test_hidden_states_are_the_means_over_each_texts_own_tokens(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model", "llama")
    embed = HiddenStateEmbedder(folder, tokens=8)
    texts = ["the lazy dog", "a", "", "the quick brown fox jumps over the lazy dog and on and on"]
    vectors = embed(texts)
    model = AutoModel.from_pretrained(folder, dtype="float32").eval()
    for text, row in zip(texts, vectors, strict=True):
        ids = embed._encoder.encode([text])[0][:8] or [embed._encoder.separator]
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0).numpy()
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_domains_by_hidden_states_of_the_seed(workspace: Workspace) -> None:
    workspace.seed(tiny_model_folder(workspace.root / ".origin"))
    discovery = workspace.discover("by", 3, DiscoverySettings(by="hidden_states"), tokens=32)
    again = workspace.discover("again", 3, DiscoverySettings(domains=["mixed"], by="hidden_states"), tokens=32)
    texts = [texts_of(discovery.folder, cluster.name) for cluster in discovery.clusters]
    assert texts == [texts_of(again.folder, cluster.name) for cluster in again.clusters]
    assert set.union(*texts) == {text for module in MODULES.values() for text in pieces(module)}
    assert all(cluster.top_words for cluster in discovery.clusters)
    assert json.loads((discovery.folder / "clusters.json").read_text())["by"] == "hidden_states"


def sentence_model(folder: Path) -> Path:
    """Write a random sentence-embedding model with the tokenizer of a tiny one."""
    tiny_model_folder(folder, "llama")
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_domains_by_sentence_embeddings(workspace: Workspace) -> None:
    folder = sentence_model(workspace.root / "embedder")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 64}))
    discovery = workspace.discover("by", 2, DiscoverySettings(by="sentence_embeddings"), folder="embedder")
    assert sum(sum(cluster.documents.values()) for cluster in discovery.clusters) == sum(
        len(pieces(module)) for module in MODULES.values()
    )
    embed = SentenceEmbedder(folder)
    texts = ["the lazy dog", "a quick brown fox jumps"]
    np.testing.assert_allclose(embed(texts)[1], embed([texts[1]])[0], atol=1e-5)
    np.testing.assert_allclose(embed.mean(texts).numpy(), embed(texts).mean(axis=0), atol=1e-6)


# --- a plugin's own ---


class ByLength:
    labels = ("short", "long")

    def __init__(self, border: float) -> None:
        self._border = border

    def distances(self, documents: Any) -> Any:
        long = np.array([len(document.text) > self._border for document in documents])
        return np.stack([long, ~long], axis=1).astype(float)

    def top_words(self, domain: int) -> list[str]:
        return [self.labels[domain]]

    def write(self, folder: Path) -> None:
        (folder / "border.txt").write_text(str(self._border))

    @classmethod
    def read(cls, folder: Path) -> ByLength:
        return cls(float((folder / "border.txt").read_text()))


def test_a_plugins_discoverer_is_used_like_ours(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [len(text) for module in MODULES.values() for text in pieces(module)]
    border = statistics.median(lengths)

    def fit(inputs: Any, options: Any) -> ByLength:
        assert Counter(document.text for document in inputs.documents())
        assert inputs.root == workspace.root
        return ByLength(border)

    offer = DomainDiscoverer("length", "by length", fit, read=ByLength.read)
    monkeypatch.setattr(discovery.installed_plugins(), "offer", lambda kind, name: offer)
    discovered = workspace.discover("by", settings=DiscoverySettings(by="length"))
    assert max(map(len, texts_of(discovered.folder, "by-short"))) <= border
    assert min(map(len, texts_of(discovered.folder, "by-long"))) > border
