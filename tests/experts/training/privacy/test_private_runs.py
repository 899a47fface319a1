"""Whole private runs: what is written, what is not, what is refused, and the router row that begins privately."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flexolmo_workspaces import train_here

from expertctl import UserError, verify
from expertctl.core.artefacts.safetensors_io import Checkpoint
from expertctl.core.hooks.training import TrainablePart, Trainer
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.run import read_run
from expertctl.experts.runs.branching import check_private
from expertctl.experts.training.privacy.accounting import epsilon_of
from expertctl.experts.training.privacy.noise import NoiseSource, Releases
from expertctl.workspace import Workspace

DP = {"epsilon": 8, "delta": 1e-6}


@pytest.fixture
def workspace(flexolmo_workspace: Workspace, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(flexolmo_workspace.root, tmp_path / "workspace", symlinks=True))


@pytest.mark.parametrize(
    ("trains", "options"),
    [
        ("all", {}),
        ("feed_forward", {}),
        ("model.layers.*.self_attn.*", {}),
        ("flexolmo", {"public": "public"}),
        ("lora", {"rank": 4}),
        ("prompt", {"tokens": 4}),
        ("residual_prompt", {"tokens": 4, "bottleneck": 16}),
    ],
)
def test_an_expert_records_its_privacy_cost_and_nothing_of_its_text(
    workspace: Workspace, trains: str, options: dict[str, Any]
) -> None:
    folder = train_here(workspace, "clinic", domain="prose", trains=trains, options=options, dp=DP)
    manifest = read_manifest(folder)
    assert verify(folder) == []
    spent = manifest.data.privacy
    run = read_run(folder)
    assert run.dp is not None
    history = [tuple(step) for step in spent.history]
    assert history == [(spent.noise_multiplier, spent.sampling_rate, run.training.steps)]
    assert spent.epsilon == epsilon_of(history, run.dp) <= 8
    assert spent.epsilon > 7.9
    assert (spent.delta, spent.clip, spent.accountant) == (1e-6, 1.0, "rdp")
    assert spent.protects == "one block of 32 tokens, added or removed"

    assert manifest.metrics == {}
    statement = manifest.domains["prose"]
    assert statement.digest is None
    full = workspace.prepare(["prose"])[0].train
    for name in ("documents", "tokens", "bytes"):
        exact = getattr(full, name)
        assert getattr(statement, name) == pytest.approx(exact, rel=0.05)
        assert set(str(getattr(statement, name))[2:]) <= {"0"}
    text = (folder / "expert.json").read_text()
    assert full.digest not in text

    assert not (folder / ".training").exists(), "the key is gone"
    assert (folder / "metrics.jsonl").is_file(), "the owner still sees the losses"


@pytest.mark.slow
def test_the_secret_is_new_for_each_run_and_a_seed_is_not(workspace: Workspace) -> None:
    def digest(name: str, noise: str) -> str:
        settings = {"domain": "prose", "trains": "feed_forward", "dp": {**DP, "noise": noise}}
        return read_manifest(train_here(workspace, name, **settings)).digest

    assert digest("one", "seeded") == digest("two", "seeded")
    assert digest("hidden-three", "secret") != digest("hidden-four", "secret")
    seeded = read_manifest(workspace.experts / "one").data.privacy
    assert seeded.epsilon is None
    assert 7.9 < seeded.epsilon_if_noise_were_secret <= 8


def test_ordinary_runs_say_nothing_of_privacy(workspace: Workspace) -> None:
    folder = train_here(workspace, "plain", domain="prose", trains="feed_forward")
    assert json.loads((folder / "run.json").read_text())["dp"] is None
    manifest = read_manifest(folder)
    assert manifest.run.dp is None
    assert manifest.data.privacy is None
    assert manifest.metrics["loss"] > 0


# --- the router row ---


@pytest.mark.slow
def test_a_router_row_begins_at_random_unless_its_noise_is_paid_for(workspace: Workspace) -> None:
    options = {"public": "public"}
    plain = train_here(workspace, "plain", domain="prose", trains="flexolmo", options=options, dp=DP)
    paid = train_here(
        workspace, "paid", domain="prose", trains="flexolmo", options=options, dp={**DP, "embedding_noise": 5}
    )
    router = Checkpoint([plain / "router.safetensors"])
    assert "domain" not in router
    assert "domain" in Checkpoint([paid / "router.safetensors"])
    spent, without = (read_manifest(folder).data.privacy for folder in (paid, plain))
    assert spent.history[0] == (5.0, 1.0, 1)
    assert 7.9 < spent.epsilon <= 8
    assert spent.noise_multiplier > without.noise_multiplier, "training gets what is left"


@pytest.mark.parametrize(
    ("options", "dp", "message"),
    [
        (
            {"public": "public", "embedding": "hidden"},
            {},
            r"reveals information about that text; add noise with --dp",
        ),
        ({"public": "public", "embedding": "./embedder"}, {}, r"sentence embeddings are not supported"),
        ({"public": "prose"}, {"embedding_noise": 5}, r"'prose' cannot be both private and public text"),
    ],
)
def test_a_row_that_would_tell_is_refused(
    workspace: Workspace, options: dict[str, Any], dp: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_here(workspace, "odd", domain="prose", trains="flexolmo", options=options, dp={**DP, **dp})


def test_the_private_embedding_comes_to_the_plain_one_as_noise_vanishes(workspace: Workspace) -> None:
    from expertctl.core.models.feed_forwards import input_moments, spread_blocks
    from expertctl.core.models.loading import load_network
    from expertctl.core.text.token_store import TokenBlocks
    from expertctl.plugins.methods.flexolmo.domain_embeddings import private_hidden_state_embedding

    model = load_network(workspace.layout.seed)
    own, public = (TokenBlocks(store.open("train"), 32) for store in workspace.prepare(["prose", "public"]))
    elsewhere = spread_blocks(public, 16)
    quiet = Releases(NoiseSource(b"k" * 32), 1e-9)
    embedding = private_hidden_state_embedding(model, own, elsewhere, quiet)
    everything = [own.block(index)[:-1] for index in range(len(own))]
    plain = input_moments(model, everything).mean
    # blocks further from public text than its own length are cut, and the mean with them
    assert torch.nn.functional.cosine_similarity(embedding.domain.double(), plain).min() > 0.9
    assert quiet.history == [(1e-9, 1.0, 1)]

    loud = Releases(NoiseSource(b"k" * 32), 50.0)
    noisy = private_hidden_state_embedding(model, own, elsewhere, loud)
    lengths = input_moments(model, elsewhere).mean.norm(dim=-1, keepdim=True)
    noise = ((noisy.domain - embedding.domain).double() / lengths).flatten()
    layers = len(embedding.domain)
    assert float(noise.std()) == pytest.approx(50 * layers**0.5 / len(own), rel=0.4)


@pytest.mark.parametrize("clip", [0.5, 3.0, 100.0])
def test_one_block_moves_the_mean_by_the_clip_at_most(clip: float) -> None:
    vectors = [torch.from_numpy(vector) for vector in np.random.default_rng(0).normal(size=(9, 4)) * 5]

    def total(chosen: list[torch.Tensor]) -> torch.Tensor:
        return Releases(NoiseSource(b"k" * 32), 1e-12).embedding_mean(chosen, clip) * len(chosen)

    whole = total(vectors)
    moved = [float((whole - total(vectors[:out] + vectors[out + 1 :])).norm()) for out in range(9)]
    assert max(moved) <= clip * (1 + 1e-9)
    if clip == 100.0:
        torch.testing.assert_close(whole, torch.stack(vectors).sum(dim=0))
    else:
        assert max(moved) == pytest.approx(clip)


# --- what is refused at once ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "auto"}, r"`from: auto` computes weights from the private text"),
        ({"training": {"compile": True}}, r"training.compile does not work with differential privacy"),
        ({"training": {"separate_documents": True}}, r"training.separate_documents does not work with differential"),
        ({"training": {"spike_deviations": 6}}, r"training.spike_deviations takes steps back whose privacy is spent"),
        (
            {"training": {"annealing": {"share": 0.5, "domains": ["prose"]}}},
            r"training.annealing does not work with differential privacy",
        ),
        ({"training": {"stages": [{"share": 0.5, "sequence_length": 16}]}}, r"training.stages do not work with diff"),
        ({"training": {"precision": "bfloat16"}}, r"differential privacy requires float32 gradients"),
        ({"dp": {"epsilon": 8}}, r"expert 'odd': dp.delta: field required"),
        ({"dp": {**DP, "epsilon": -1}}, r"dp.epsilon: input should be greater than 0"),
        ({"dp": {**DP, "delta": 2}}, r"dp.delta: input should be less than 1"),
        ({"dp": {**DP, "clips": 2}}, r"unknown key 'clips' in dp \(did you mean 'clip'\?"),
        ({"dp": {**DP, "noise": "loud"}}, r"dp.noise: input should be 'secret' or 'seeded'"),
    ],
)
def test_branching_refuses_leaking_and_impossible_settings(
    workspace: Workspace, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        workspace.branch("odd", **{"domain": "prose", "dp": DP, **settings})
    assert not (workspace.experts / "odd").exists()


def test_a_trainer_that_reads_the_text_must_say_that_it_does_so_privately() -> None:
    from expertctl.core.config.settings import DpConfig, ExpertConfig, TrainingConfig

    def prepare(context: Any) -> TrainablePart:
        raise AssertionError("never asked")

    expert = ExpertConfig(domain="prose", dp=DpConfig(**DP))
    reader = Trainer("reader", "reads", prepare, uses_text=True)
    with pytest.raises(UserError, match="trainer 'reader' reads the text before training"):
        check_private(expert, TrainingConfig(), reader)
    check_private(expert, TrainingConfig(), Trainer("good", "asks", prepare, uses_text=True, private_text=True))
    check_private(ExpertConfig(domain="prose"), TrainingConfig(), reader)


def test_without_opacus_it_says_how_to_get_it(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    def hidden(name: str, *further: Any) -> Any:
        return None if name == "opacus" else find_spec(name, *further)

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(UserError, match=r"needs Opacus, which is not installed: pip install 'expertctl\[privacy\]'"):
        workspace.branch("odd", domain="prose", dp=DP)


def test_too_little_text_is_refused_before_training(workspace: Workspace) -> None:
    with pytest.raises(UserError, match=r"a step samples 4096 blocks, but the text has only \d+; lower"):
        train_here(
            workspace,
            "odd",
            domain="prose",
            trains="feed_forward",
            dp=DP,
            training={"batch_size": 4096, "tokens": 4096 * 32},
        )
