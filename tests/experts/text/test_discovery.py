"""Unlabelled text becomes domains: every document once, splits kept, the same in one process and in several."""

from __future__ import annotations

import inspect
import json
import random
import statistics
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertctl import DiscoverySettings, UserError, Workspace
from expertctl.core.text.clustering.clusterer import Clusterer
from expertctl.experts.text import discovery
from expertctl.experts.text.corpora import domain_documents

MODULES = {"prose": textwrap, "chance": random, "means": statistics}


def documents() -> list[str]:
    texts = []
    for module in MODULES.values():
        lines = inspect.getsource(module).splitlines()
        texts += ["\n".join(lines[begin : begin + 8]) for begin in range(0, len(lines), 8)]
    return texts


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    texts = documents()
    random.Random(0).shuffle(texts)
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = {"domains": {"mixed": {"path": "mixed.jsonl", "licence": "PSF-2.0"}}}
    (tmp_path / "expertctl.yaml").write_text(yaml.safe_dump(config))
    return Workspace(tmp_path)


def texts_of(workspace: Workspace, domains: list[str], part: str) -> list[str]:
    return [
        text for domain in domains for text in domain_documents(workspace.config.domains[domain], workspace.root, part)
    ]


def test_every_document_is_in_one_cluster_and_stays_on_its_side(workspace: Workspace) -> None:
    result = workspace.discover("campus", 3)
    names = [cluster.name for cluster in result.clusters]
    assert names == ["campus-0", "campus-1", "campus-2"]
    for part in ("train", "valid", "test"):
        assert sorted(texts_of(workspace, names, part)) == sorted(texts_of(workspace, ["mixed"], part))
        assert sum(cluster.documents[part] for cluster in result.clusters) == len(texts_of(workspace, ["mixed"], part))
    clusterer = Clusterer.read(result.folder)
    for number, name in enumerate(names):
        points = clusterer.points(texts_of(workspace, [name], "train"))
        assert set(clusterer.distances(points).argmin(axis=1).tolist()) == {number}
        assert workspace.config.domains[name].licence == "PSF-2.0"


def test_the_statement_says_what_clusters_are_about(workspace: Workspace) -> None:
    result = workspace.discover("campus", 3)
    content = json.loads((result.folder / "clusters.json").read_text())
    assert content == json.loads(json.dumps(result.statement()))
    words = [" ".join(cluster["top_words"]) for cluster in content["clusters"]]
    assert any("random" in word for word in words)
    assert all(len(cluster["examples"]) == 3 for cluster in content["clusters"])
    assert list(content["source"]) == ["mixed"]


def test_several_processes_give_the_same_files(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "BATCH", 16)
    alone = workspace.discover("one", 3, DiscoverySettings(jobs=1))
    monkeypatch.setattr(discovery, "PARALLEL_FROM", 0)
    many = workspace.discover("many", 3, DiscoverySettings(domains=["mixed"], jobs=2))
    for number in range(3):
        for part in ("train", "valid", "test"):
            mine = (alone.folder / f"one-{number}" / f"{part}.jsonl").read_bytes()
            assert mine == (many.folder / f"many-{number}" / f"{part}.jsonl").read_bytes()
    assert alone.source == many.source


def test_the_order_of_documents_does_not_matter_to_the_sample(workspace: Workspace) -> None:
    first = workspace.discover("campus", 3, DiscoverySettings(sample=60))
    path = workspace.root / "mixed.jsonl"
    path.write_text("".join(sorted(path.read_text().splitlines(keepends=True))))
    again = workspace.discover("again", 3, DiscoverySettings(domains=["mixed"], sample=60))
    assert [cluster.top_words for cluster in first.clusters] == [cluster.top_words for cluster in again.clusters]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"clusters": 5000}, "5000 clusters need at least 5000 texts"),
        ({"clusters": 2, "settings": DiscoverySettings(domains=["nix"])}, "no domain 'nix'"),
        ({"clusters": 2, "stop_words": "klingon"}, "stop word file 'klingon' does not exist"),
        ({}, "the number of clusters is missing"),
        (
            {"clusters": 2, "settings": DiscoverySettings(by="feeling")},
            "no domain discoverer 'feeling'; installed: hidden_states",
        ),
        ({"clusters": 2, "colour": 1}, "domain discoverer 'tfidf' has no option 'colour'"),
        ({"clusters": 2, "settings": DiscoverySettings(by="hidden_states")}, "discoverer hidden_states needs a seed"),
        ({"clusters": 2, "settings": DiscoverySettings(by="sentence_embeddings")}, "needs the folder of a model"),
        (
            {"clusters": 2, "folder": "nowhere", "settings": DiscoverySettings(by="sentence_embeddings")},
            "has no config.json",
        ),
        ({"settings": DiscoverySettings(by="metadata")}, "mixed.jsonl:1: no field 'source'; fields: text"),
    ],
)
def test_impossible_discoveries_are_refused_and_leave_nothing(
    workspace: Workspace, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        workspace.discover("campus", **settings)
    assert not list((workspace.root / "clusters").glob("*")) if (workspace.root / "clusters").exists() else True


@pytest.mark.parametrize(
    ("texts", "clusters", "said"),
    [
        ([""] * 20, 2, "no training document to cluster in mixed"),
        (["the same text over and over"] * 60, 1, "has no (training|validation) document"),
        (["the court held", "a poem of words"], 4, "4 clusters need at least 4 texts"),
        (
            [f"word{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(60)],
            3,
            "only 0 of .. texts do",
        ),
        (["law", "code", "poem", "song"] * 15, 2, "has no (training|validation) document"),
    ],
    ids=["empty", "duplicates", "fewer", "strangers", "one word"],
)
def test_text_that_is_too_little_is_told_in_a_line(
    workspace: Workspace, texts: list[str], clusters: int, said: str
) -> None:
    (workspace.root / "mixed.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(UserError, match=said):
        workspace.discover("campus", clusters)


def test_empty_documents_among_others_are_left_out(workspace: Workspace) -> None:
    texts = [("", f"court law judge {n}", f"python code function {n}")[n % 3] for n in range(120)]
    (workspace.root / "mixed.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = workspace.discover("campus", 2)
    assert sum(sum(cluster.documents.values()) for cluster in result.clusters) == 80
    assert {word for cluster in result.clusters for word in cluster.top_words} >= {"court", "code"}


def test_text_without_spaces_is_sorted_by_runs_of_letters(workspace: Workspace) -> None:
    letters = "春風又綠江南白日依山盡黃"
    source = random.Random(0)
    texts = ["".join(source.choices(letters[:6] if n % 2 else letters[6:], k=20)) for n in range(300)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (workspace.root / "mixed.jsonl").write_text("".join(lines))
    result = workspace.discover("campus", 2)
    for cluster in result.clusters:
        members = texts_of(workspace, [cluster.name], "train")
        assert len({text[0] in letters[:6] for text in members}) == 1


def test_stop_words_can_be_a_file_of_any_language(workspace: Workspace) -> None:
    (workspace.root / "stop.txt").write_text("random\nself\n")
    result = workspace.discover("campus", 3, stop_words=str(workspace.root / "stop.txt"))
    assert not {"random", "self"} & {word for cluster in result.clusters for word in cluster.top_words}


def test_a_set_is_not_replaced_unasked_nor_made_of_itself(workspace: Workspace) -> None:
    workspace.discover("campus", 2)
    with pytest.raises(UserError, match="exists already"):
        workspace.discover("campus", 2)
    with pytest.raises(UserError, match="'campus-0' is itself one of the clusters 'campus'"):
        workspace.discover("campus", 2, DiscoverySettings(domains=["campus-0"]), force=True)
    assert len(workspace.discover("campus", 3, force=True).clusters) == 3
    finer = workspace.discover("finer", 2, DiscoverySettings(domains=["campus-0"]))
    assert list(finer.source) == ["campus-0"]


def test_a_domain_of_the_project_file_goes_before_a_cluster(workspace: Workspace) -> None:
    workspace.discover("campus", 2)
    path = workspace.root / "expertctl.yaml"
    config = yaml.safe_load(path.read_text())
    config["domains"]["campus-0"] = {"path": "mixed.jsonl"}
    path.write_text(yaml.safe_dump(config))
    assert Workspace(workspace.root).config.domains["campus-0"].path == "mixed.jsonl"


def test_a_damaged_list_of_clusters_is_named(workspace: Workspace) -> None:
    result = workspace.discover("campus", 2)
    (result.folder / "clusters.json").write_text('{"clusters": [{}]}')
    with pytest.raises(UserError, match=r"clusters.json is not a valid list of clusters"):
        Workspace(workspace.root).config  # noqa: B018  # reading it is what is tested


def test_clusters_share_the_budget_of_one_expert(workspace: Workspace) -> None:
    from expertctl.core.testing import tiny_model_folder

    workspace.seed(tiny_model_folder(workspace.root / ".origin"))
    workspace.discover("campus", 3)
    training = {"tokens": 3000, "sequence_length": 32, "batch_size": 2}
    specs = workspace.experts.branch_clusters("campus", training=training)
    assert [(spec.name, spec.domains) for spec in specs] == [
        (f"campus-{number}", (f"campus-{number}",)) for number in range(3)
    ]
    assert {spec.training.tokens for spec in specs} == {1000}
    with pytest.raises(UserError, match="no set of clusters 'camp' \\(did you mean 'campus'\\?\\)"):
        workspace.experts.branch_clusters("camp")
