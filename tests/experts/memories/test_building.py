"""Building memories: the keys of a naive loop, what counts, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversations import TALKS, chat_model, write_records
from memory_workspaces import naive_key, stored, text_config, write_memory
from naive_decoding import double_model

from expertctl import Sampling, UserError, Workspace
from expertctl.core.models.decoding.memories import search
from expertctl.core.models.decoding.memories.indexing import resolve_index, write_index
from expertctl.core.models.decoding.memories.manifest import INDEX_FILE, read_memory, verify_memory
from expertctl.experts.memories.settings import BuildSettings
from expertctl.experts.text.corpora import prepare_domain

UNFITTED = BuildSettings(fit=False)


@pytest.fixture(scope="module", params=["llama", "olmo2"])
def workspace(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, new_workspace: Any
) -> Workspace:
    root = tmp_path_factory.mktemp(request.param)
    return Workspace(new_workspace(root / "workspace", family=request.param, config=text_config(root / "text")))


@pytest.mark.parametrize("context", [None, 40])
def test_keys_are_those_of_a_naive_loop(workspace: Workspace, context: int | None) -> None:
    settings = BuildSettings(context, fit=False)
    memory = workspace.memories.build("both", ["law", "code"], settings=settings, force=True)
    keys, values = stored(workspace.memories / "both")
    double = double_model(workspace.layout.seed)
    expected_keys, expected_values = [], []
    stride = memory.window - memory.context
    for domain in ("law", "code"):
        config = workspace.config.domains[domain]
        store = prepare_domain(workspace.layout, domain, config, workspace.layout.seed).open("train")
        tokens = store.read(0, len(store)).tolist()
        for target in range(1, len(tokens)):
            if tokens[target] in store.part.markers:
                continue
            number = max(-(-(target - memory.window) // stride), 0)
            begin = min(number * stride, len(tokens) - 1 - memory.window)
            assert target - begin >= min(target, memory.context)
            if target % 5 == 0:  # a sample, for the time
                expected_keys.append((len(expected_values), naive_key(double, tokens[begin:target])))
            expected_values.append(tokens[target])
    assert (memory.window, memory.context) == (128, 64 if context is None else context)
    assert values == expected_values
    assert memory.keys == len(values) == sum(memory.domain_keys.values())
    assert memory.key == ("feed_forward_input" if "llama" in str(workspace.root) else "final_hidden_state")
    for number, key in expected_keys:
        torch.testing.assert_close(keys[number], key, atol=2e-3, rtol=2e-3)  # float16


def test_a_memory_of_an_expert_and_of_an_average_is_used_by_them_alone(workspace: Workspace) -> None:
    if not (workspace.layout.generalists / "mean").exists():
        workspace.merge("mean", method="linear")
    for model in ("law", "mean"):
        memory = workspace.memories.build(f"of-{model}", ["code"], model, settings=UNFITTED, force=True)
        assert memory.model.name == model
        options = {"memory": f"of-{model}", "temperature": 10.0}
        workspace.generate(model, "x", Sampling(2), decoder="knn", decoder_options=options)
        with pytest.raises(UserError, match=f"made with .* '{model}'"):
            workspace.generate("news", "x", Sampling(2), decoder="knn", decoder_options=options)


@pytest.mark.parametrize(
    ("method", "reason"), [("ensemble", "an ensemble of several"), ("btx", "a mixture of experts")]
)
def test_models_of_several_transformers_are_refused(workspace: Workspace, method: str, reason: str) -> None:
    if not (workspace.layout.generalists / method).exists():
        workspace.merge(method, method=method)
    with pytest.raises(UserError, match=reason):
        workspace.memories.build("none", ["law"], method)
    assert not (workspace.memories / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "settings", "reason"),
    [
        (("law", ["law"]), UNFITTED, "the name 'law' is taken"),
        (("a/b", ["law"]), UNFITTED, "cannot be called"),
        (("m", ["lav"]), UNFITTED, "no domain 'lav'.*did you mean 'law'"),
        (("m", ["law"], "sead"), UNFITTED, "no model 'sead'.*did you mean 'seed'"),
        (("m", ["law"]), BuildSettings(128, fit=False), "--context 128 leaves no keys in the 128 positions"),
    ],
)
def test_what_cannot_be_built_is_one_line(
    workspace: Workspace, arguments: Any, settings: BuildSettings, reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        workspace.memories.build(*arguments, settings=settings)
    assert "\n" not in str(caught.value)
    assert not list(workspace.memories.folder.glob(".m.*"))


def test_a_taken_name_needs_force_and_is_taken_for_experts(workspace: Workspace) -> None:
    workspace.memories.build("taken", ["law"], settings=UNFITTED)
    with pytest.raises(UserError, match="exists already; use --force"):
        workspace.memories.build("taken", ["law"], settings=UNFITTED)
    with pytest.raises(UserError, match="the name 'taken' is taken"):
        workspace.branch("taken", domain="law")


def test_a_memory_is_renamed_and_removed(workspace: Workspace) -> None:
    workspace.memories.build("first", ["law"], settings=UNFITTED)
    workspace.memories.rename("first", "second")
    assert verify_memory(workspace.memories / "second") == []
    assert read_memory(workspace.memories / "second").name == "second"
    assert workspace.remove("second") == []
    assert not (workspace.memories / "second").exists()
    with pytest.raises(UserError, match="no memory 'second'"):
        workspace.generate("seed", "x", decoder="knn", decoder_options={"memory": "second"})


def test_a_model_with_a_memory_is_kept(workspace: Workspace) -> None:
    workspace.memories.build("on-news", ["law"], "news", settings=UNFITTED)
    with pytest.raises(UserError, match="on-news could not be loaded without its files"):
        workspace.remove("news")
    workspace.remove("on-news")


@pytest.mark.parametrize("index", ["exact", "ivf"])
@pytest.mark.parametrize("codes", ["float16", "int8"])
def test_every_index_finds_what_a_comparison_of_all_keys_does(
    workspace: Workspace, index: Any, codes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    name = f"{index}-{codes}"
    workspace.memories.build(
        name, ["law", "code"], settings=BuildSettings(index=index, codes=codes, fit=False), force=True
    )
    folder = workspace.memories / name
    assert verify_memory(folder) == []
    assert (folder / INDEX_FILE).exists() == (name != "exact-float16")
    keys, tokens = stored(folder)
    queries = torch.randn(5, keys.shape[1], generator=torch.Generator().manual_seed(1)) + keys[:5].float()
    distances = ((queries.double()[:, None] - keys[None]) ** 2).sum(-1)
    store = search.Datastore(folder, probes=10_000)
    said: list[str] = []
    monkeypatch.setattr(search, "has_faiss", lambda: False)

    class Notes(search.Reporter):
        def say(self, line: str) -> None:
            said.append(line)

    without = search.Datastore(folder, reporter=Notes())
    assert len(said) == (name != "exact-float16")
    assert all("faiss is not installed" in line for line in said)
    for opened in (store, without):
        found = opened.search(queries, 9)
        expected = distances.sort(dim=1).values[:, :9].float()
        torch.testing.assert_close(found.distances, expected, atol=1e-3, rtol=1e-4)
        for row, row_distances in zip(found.tokens, distances, strict=True):
            nearest = sorted(range(len(tokens)), key=lambda number: float(row_distances[number]))
            assert int(row[0]) == tokens[nearest[0]]
    assert store.search(queries, 10**6).distances.shape == (5, len(tokens))


def test_product_quantisation_finds_most_neighbours(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    random = np.random.default_rng(0)
    keys = random.standard_normal((4000, 16)).astype(np.float16)
    for kind in ("exact", "ivf"):
        record = resolve_index(kind, "pq", len(keys), 16)  # type: ignore[arg-type]
        folder = write_memory(tmp_path / kind, keys, [0] * len(keys), record)
        write_index(folder, keys, record)
        queries = torch.from_numpy(random.standard_normal((50, 16)).astype(np.float32))
        found = search.Datastore(folder, probes=200).search(queries, 8).distances
        exact = ((queries[:, None] - torch.from_numpy(keys.astype(np.float32))) ** 2).sum(-1).sort(dim=1).values[:, :8]
        assert float((found <= exact[:, -1:] * 1.0001).float().mean()) > 0.9
    with pytest.raises(UserError, match="codes 'pq' need at least 1,024 keys of a width that is a multiple of 4"):
        resolve_index("exact", "pq", 1000, 16)


def test_without_faiss_an_index_is_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertctl.core.models.decoding.memories.indexing.has_faiss", lambda: False)
    with pytest.raises(UserError, match=r"needs faiss: pip install 'expertctl\[memory\]'"):
        workspace.memories.build("none", ["law"], settings=BuildSettings(index="ivf", fit=False))
    assert not (workspace.memories / "none").exists()


def test_conversations_have_keys_of_counted_tokens_only(tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    root.mkdir()
    path = write_records(tmp_path / "talks.jsonl", TALKS * 4)
    domain = {"train": path, "valid": path, "format": "chat"}
    (root / "expertctl.yaml").write_text(json.dumps({"domains": {"chat": domain}}), encoding="utf-8")
    workspace = Workspace(root)
    workspace.seed(chat_model(tmp_path / "model"))
    memory = workspace.memories.build("chat-memory", ["chat"], settings=BuildSettings(k=4, fit_tokens=200))
    store = prepare_domain(workspace.layout, "chat", workspace.config.domains["chat"], workspace.layout.seed).open(
        "train"
    )
    counted = store.counted(0, len(store)) & ~np.isin(store.read(0, len(store)), store.part.markers)
    assert memory.keys == int(counted.sum()) < len(store)
    assert stored(workspace.memories / "chat-memory")[1] == store.read(0, len(store))[counted].tolist()
    assert memory.fit is not None
    assert memory.fit.bits_with <= memory.fit.bits_without


@pytest.mark.slow
def test_a_kill_leaves_nothing_under_the_final_name(shared_workspace: Path, tmp_path: Path) -> None:
    root = shutil.copytree(shared_workspace, tmp_path / "copy")
    config = text_config(tmp_path / "text", documents=1500)
    (root / "expertctl.yaml").write_text(config, encoding="utf-8")
    command = [sys.executable, "-P", "-m", "expertctl.cli.main", "-w", str(root), "memory", "build", "big"]
    process = subprocess.Popen([*command, "--domains", "law", "--no-fit", "-q"], env=os.environ)
    keys: list[Path] = []
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in keys):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
        keys = list((root / "memories").glob(".big*/keys.bin"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    copy = Workspace(root)
    assert not (root / "memories" / "big").exists()
    assert "big" not in {memory.name for memory in copy.memories.list()}
    (root / "expertctl.yaml").write_text(text_config(tmp_path / "text"), encoding="utf-8")
    copy = Workspace(root)
    copy.memories.build("big", ["law"], settings=UNFITTED)
    assert verify_memory(root / "memories" / "big") == []
    assert not list((root / "memories").glob(".big*"))
