"""Proxies: which documents are picked, what is written, and that nothing is held that grows with the text."""

from __future__ import annotations

import argparse
import calendar
import configparser
import csv
import dataclasses
import difflib
import fractions
import hashlib
import heapq
import inspect
import json
import netrc
import optparse
import pprint
import random
import shlex
import shutil
import string
import tarfile
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import numpy as np
import pytest
from reporters import Recorder

from expertctl.core.artefacts.layout import Layout
from expertctl.core.config.project import load_project
from expertctl.core.config.settings import DomainConfig
from expertctl.core.errors import UserError
from expertctl.experts.text import proxy_corpus as proxy_module
from expertctl.experts.text.corpora import PARTS
from expertctl.experts.text.proxy_corpus import Proxy, ProxySettings, best_distinct, make_proxy


def code_of(*modules: ModuleType, pieces: int) -> list[str]:
    """Return so many pieces of each module's source, ten lines long."""
    documents: list[str] = []
    for module in modules:
        lines = [line for line in inspect.getsource(module).splitlines() if len(line.strip()) > 5]
        starts = range(0, len(lines), max(10, len(lines) // pieces))
        documents += ["\n".join(lines[start : start + 10]) for start in list(starts)[:pieces]]
    return documents


PRIVATE = code_of(calendar, csv, difflib, fractions, pprint, random, shlex, shutil, string, textwrap, pieces=12)
CODE = code_of(argparse, configparser, dataclasses, heapq, netrc, optparse, tarfile, tempfile, threading, pieces=7)
PROSE = [
    part
    for name in sorted(topics)
    for part in topics[name].split("\n\n")
    if len(part.split()) > 40 and ">>>" not in part
][:400:3]


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A workspace with private code, and a public domain of code and prose."""
    config = {
        "domains": {
            "law": {"train": "law.jsonl", "valid": "valid.jsonl"},
            "web": {"train": "web.jsonl", "valid": "valid.jsonl", "licence": "CC-BY-4.0"},
        }
    }
    (tmp_path / "expertctl.yaml").write_text(json.dumps(config), encoding="utf-8")
    write(tmp_path / "law.jsonl", PRIVATE)
    write(tmp_path / "web.jsonl", [*PROSE, *CODE])
    write(tmp_path / "valid.jsonl", ["kept apart for validation"])
    return Layout(tmp_path)


def pick(layout: Layout, name: str = "near", *, documents: int | None = 30, **settings: object) -> Proxy:
    return make_proxy(
        layout,
        load_project(layout.config_file),
        name,
        like="law",
        source="web",
        documents=documents,
        **settings,  # type: ignore[arg-type]  # each test gives its own
    )


def test_there_is_text_to_test_on() -> None:
    assert len(PRIVATE) > 100
    assert len(CODE) > 50
    assert len(PROSE) > 100


def test_the_picked_documents_are_of_the_right_topic(layout: Layout) -> None:
    proxy = pick(layout)
    texts = read(proxy.path)
    assert len(texts) == 30
    assert sum(text in CODE for text in texts) >= 26
    assert 0.7 < proxy.held_out_accuracy <= 1
    assert 0 < proxy.lowest_score < 1


def test_no_document_is_judged_by_a_classifier_that_learnt_it(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    class Remembering:
        """Takes what it knows for public text, and everything else for what is wanted."""

        def __init__(self, like: list[str], source: list[str]) -> None:
            self.known = {*like, *source}

        def decision_function(self, texts: list[str]) -> np.ndarray:
            return np.array([0.0 if text in self.known else 1.0 for text in texts])

        predict = decision_function

    monkeypatch.setattr(proxy_module, "_fit_classifier", lambda like, source, settings: Remembering(like, source))
    assert pick(layout, documents=len(PROSE)).lowest_score > 0.7


def test_the_statement_counts_and_never_quotes(layout: Layout) -> None:
    proxy = pick(layout)
    assert sorted(path.name for path in proxy.path.parent.iterdir()) == ["near.json", "near.jsonl"]
    statement = json.loads((layout.root / "proxies" / "near.json").read_text(encoding="utf-8"))
    assert statement == proxy.statement()
    texts = read(proxy.path)
    assert (statement["documents"], statement["bytes"]) == (30, sum(len(text.encode()) for text in texts))
    assert statement["digest"] == digest(texts)
    assert (statement["like"]["documents"], statement["like"]["digest"]) == (len(PRIVATE), digest(PRIVATE))
    assert statement["from"]["digest"] == digest([*PROSE, *CODE])
    assert statement["licence"] == "CC-BY-4.0"
    assert statement["classifier"]["seed"] == 0
    words = json.dumps(statement)
    quotable = [line.strip() for text in [*PRIVATE, *texts] for line in text.splitlines()]
    assert not any(line in words for line in quotable if len(line) > 20)


def digest(texts: list[str]) -> str:
    """Return what a prepared domain calls its digest."""
    parts = [text.encode() for text in texts]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()


def test_only_public_text_is_written_and_only_training_parts_are_read(layout: Layout) -> None:
    (layout.root / "valid.jsonl").unlink()
    assert set(read(pick(layout).path)) <= {*PROSE, *CODE}


def test_the_same_text_and_seed_give_the_same_bytes(layout: Layout) -> None:
    first, second = pick(layout), pick(layout, "again")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.held_out_accuracy == second.held_out_accuracy
    other = pick(layout, "other", settings=ProxySettings(seed=1))
    assert (other.held_out_accuracy, other.lowest_score) != (first.held_out_accuracy, first.lowest_score)


def test_neither_the_order_of_documents_nor_copies_change_what_is_picked(layout: Layout) -> None:
    before = set(read(pick(layout).path))
    write(layout.root / "web.jsonl", [*CODE[::-1], *PROSE, *CODE])
    texts = read(pick(layout, "again").path)
    assert len(texts) == len(set(texts)) == 30
    assert set(texts) == before


def test_a_tenth_is_picked_by_default_and_the_sample_may_be_smaller_than_the_text(layout: Layout) -> None:
    proxy = pick(layout, documents=None, settings=ProxySettings(sample=80))
    assert proxy.text.documents == (len(PROSE) + len(CODE)) // 10
    assert sum(text in CODE for text in read(proxy.path)) >= 0.7 * proxy.text.documents


def test_the_printed_domain_reads_the_proxy(layout: Layout) -> None:
    domain = DomainConfig.model_validate(pick(layout).domain())
    assert (domain.path, domain.licence) == ("proxies/near.jsonl", "CC-BY-4.0")
    parts = [list(proxy_module.domain_documents(domain, layout.root, part)) for part in PARTS]
    assert sum(map(len, parts)) == 30
    assert all(parts)


def test_a_proxy_that_is_there_stays_without_force(layout: Layout) -> None:
    before = pick(layout).path.read_bytes()
    with pytest.raises(UserError, match=r"near\.jsonl exists already; use --force"):
        pick(layout, documents=10)
    assert (layout.root / "proxies" / "near.jsonl").read_bytes() == before
    assert len(read(pick(layout, documents=10, force=True).path)) == 10


def test_a_failure_keeps_the_previous_corpus(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    pick(layout)
    folder = layout.root / "proxies"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def changing(domain: DomainConfig, root: Path, part: str) -> Iterator[str]:
        nonlocal reads
        reads += 1
        yield from PRIVATE if domain.licence is None else [*PROSE, *CODE] if reads < 4 else PROSE

    reads = 0
    monkeypatch.setattr(proxy_module, "domain_documents", changing)
    with pytest.raises(UserError, match="changed while it was read; rerun the command"):
        pick(layout, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "like", "source", "documents", "said"),
    [
        ("near", "lwa", "web", 5, r"no domain 'lwa' \(did you mean 'law'\?\)"),
        ("near", "law", "wbe", 5, r"no domain 'wbe' \(did you mean 'web'\?\)"),
        ("near", "law", "law", 5, "--like and --from are both 'law'"),
        ("web", "law", "web", 5, "has a domain 'web' already; give the proxy another name"),
        ("../x", "law", "web", 5, r"a proxy cannot be called '\.\./x'"),
        ("near", "law", "web", 5000, r"cannot select 5,000 documents: .*request fewer with --documents"),
    ],
)
def test_impossible_selections_are_refused(
    layout: Layout, name: str, like: str, source: str, documents: int, said: str
) -> None:
    project = load_project(layout.config_file)
    with pytest.raises(UserError, match=said) as refusal:
        make_proxy(layout, project, name, like=like, source=source, documents=documents)
    assert "\n" not in str(refusal.value)
    assert not list((layout.root / "proxies").glob("*"))


@pytest.mark.parametrize("short", ["law", "web"])
def test_too_few_documents_are_refused_copies_counting_once(layout: Layout, short: str) -> None:
    write(layout.root / f"{short}.jsonl", PROSE[:19] * 3)
    with pytest.raises(UserError, match=f"domain '{short}' has 19 different documents .* at least 20"):
        pick(layout)


def test_the_best_are_those_that_sorting_finds() -> None:
    numbers = random.Random(0)
    items = [(float(numbers.randrange(50)), numbers.randbytes(4)) for _ in range(500)]
    expected = sorted(items, reverse=True)[:40]
    assert best_distinct(items, 40) == {key: score for score, key in expected}
    assert best_distinct([*items, *reversed(items)], 40) == best_distinct(items, 40)
    assert best_distinct(items[:3], 40) == {key: score for score, key in items[:3]}


class Counted(str):
    """A text that knows how many of its kind are alive."""

    alive = most = 0

    def __new__(cls, text: str) -> Counted:
        cls.alive += 1
        cls.most = max(cls.most, cls.alive)
        return super().__new__(cls, text)

    def __del__(self) -> None:
        Counted.alive -= 1


def test_documents_are_streamed(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many documents there are, no more than a few are alive at a time."""

    def documents(domain: DomainConfig, root: Path, part: str) -> Iterator[str]:
        assert part == "train"
        texts = PRIVATE if domain.licence is None else [*PROSE, *CODE]
        for number in range(1500):
            yield Counted(f"{number}\n{texts[number % len(texts)]}")

    monkeypatch.setattr(proxy_module, "domain_documents", documents)
    recorder = Recorder()
    proxy = pick(layout, settings=ProxySettings(sample=100), reporter=recorder)
    assert proxy.text.documents == 30
    assert proxy.source.documents == 1500
    assert Counted.most <= 4
    assert recorder.steps[0] == ("reading law", 256, None)
    assert {task for task, *_ in recorder.steps} == {"reading law", "reading web", "scoring web", "writing"}


def test_the_sample_is_bounded_and_does_not_hang_on_the_order() -> None:
    settings = ProxySettings(sample=50, characters=10)
    documents = list(proxy_module._with_keys((f"{number} and some more" for number in range(1000)), seed=0))
    sample, count = proxy_module._sample(documents, "web", settings)
    assert list(sample) == sorted(key for key, _ in documents)[:50]
    assert all(len(text) == 10 for text in sample.values())
    assert count.documents == 1000
    assert proxy_module._sample(documents[::-1], "web", settings)[0] == sample
