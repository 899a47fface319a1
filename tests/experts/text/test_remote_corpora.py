"""Domains whose text is at a URL: fetched once, noticed when it changes, and used without the network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import fsspec
import pytest
from cutting_servers import FileHandler, Traffic, serving
from reporters import Recorder

from expertctl import UserError
from expertctl.core.artefacts.layout import Layout
from expertctl.core.config.settings import DomainConfig
from expertctl.core.remote.copies import COPIES_FOLDER, refresh
from expertctl.experts.text.corpora import (
    DOMAIN_FILE,
    PreparedDomain,
    domain_documents,
    prepare_domain,
    prepared_domain,
)


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertctl.core.remote.retries.FIRST_WAIT_S", 0.001)


def texts(number: int) -> str:
    return "".join(json.dumps({"text": f"document {index} of {number}"}) + "\n" for index in range(number))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "ws").mkdir()
    return Layout(tmp_path / "ws")


def prepare(layout: Layout, domain: DomainConfig, model_folder: Path) -> tuple[PreparedDomain, list[str]]:
    recorder = Recorder()
    return prepare_domain(layout, "law", domain, model_folder, reporter=recorder), recorder.lines


def test_remote_text_is_that_of_the_same_local_file(layout: Layout, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "law.jsonl").write_text(texts(40))
    local = prepare_domain(layout, "local", DomainConfig(path=str(tmp_path / "law.jsonl")), model_folder)
    domain = DomainConfig(path=f"file://{tmp_path}/law.jsonl")
    remote, said = prepare(layout, domain, model_folder)
    assert (remote.train, remote.valid) == (local.train, local.valid)
    assert said == []
    (digests,) = json.loads((remote.folder / DOMAIN_FILE).read_text())["remote"].values()
    assert [len(digest) for digest in digests.values()] == [64]
    assert list(domain_documents(domain, layout.root, "train")) == list(
        domain_documents(DomainConfig(path=str(tmp_path / "law.jsonl")), layout.root, "train")
    )


def test_a_changed_file_is_noticed_and_an_unchanged_one_is_not_fetched_again(
    layout: Layout, model_folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "law.jsonl").write_text(texts(40))
    traffic = Traffic()
    with serving(FileHandler, traffic, root=store) as url:
        domain = DomainConfig(path=f"{url}/law.jsonl")
        assert prepared_domain(layout, "law", domain, model_folder) is None
        assert traffic.requests == []
        first, _ = prepare(layout, domain, model_folder)
        sent = traffic.total
        assert prepare(layout, domain, model_folder) == (first, [])
        assert traffic.total == sent
        (store / "law.jsonl").write_text(texts(60))
        asked = len(traffic.requests)
        assert prepared_domain(layout, "law", domain, model_folder) == first  # looks at no network
        assert len(traffic.requests) == asked
        second, said = prepare(layout, domain, model_folder)
        assert second.train.documents > first.train.documents
        assert any("has changed since it was fetched" in line for line in said)
    third, said = prepare(layout, domain, model_folder)  # the server is gone
    assert third == second
    assert any("the copy that was fetched before is used" in line for line in said)


def test_text_that_was_never_fetched_needs_the_remote(layout: Layout, model_folder: Path) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        prepare(layout, DomainConfig(path="http://127.0.0.1:9/law.jsonl"), model_folder)
    with pytest.raises(UserError, match="does not exist"):
        prepare(layout, DomainConfig(path="memory://nothing/law.jsonl"), model_folder)
    with pytest.raises(UserError, match="hf://datasets/owner/name/FILE"):
        prepare(layout, DomainConfig(path="hub:owner/name"), model_folder)


def test_a_copy_of_text_on_the_hub_is_used_offline(
    layout: Layout, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "hf://datasets/owner/name/law.jsonl"
    (tmp_path / "law.jsonl").write_text(texts(40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        prepare(layout, DomainConfig(path=url), model_folder)
    copy = refresh(layout.root, f"file://{tmp_path}/law.jsonl").parent.parent
    copy.rename(copy.with_name(hashlib.sha256(url.encode()).hexdigest()[:16]))
    _, said = prepare(layout, DomainConfig(path=url), model_folder)
    assert any("the copy that was fetched before is used" in line for line in said)


def test_folders_and_parts(layout: Layout, model_folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/corpus/train.jsonl", texts(30).encode())
    memory.pipe_file("/corpus/valid.jsonl", texts(9).encode())
    memory.pipe_file("/corpus/.hidden.jsonl", b"no JSON")
    folder, _ = prepare(layout, DomainConfig(path="memory://corpus"), model_folder)
    parts, _ = prepare(
        layout, DomainConfig(train="memory://corpus/train.jsonl", valid="memory://corpus/valid.jsonl"), model_folder
    )
    assert folder.train == parts.train
    assert len(list((layout.root / COPIES_FOLDER).iterdir())) == 3


def test_secrets_of_a_url_are_in_no_record(layout: Layout, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "law.jsonl").write_text(texts(40))
    with serving(FileHandler, Traffic(), root=tmp_path) as url:
        domain = DomainConfig(path=f"{url}/law.jsonl?token=secretword")
        prepared, _ = prepare(layout, domain, model_folder)
    for record in (prepared.folder / DOMAIN_FILE, *(layout.root / COPIES_FOLDER).rglob("source.json")):
        assert "secretword" not in record.read_text()
