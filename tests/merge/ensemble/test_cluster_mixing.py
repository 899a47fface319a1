"""Clusters that weigh experts: text that grows, the formula, and an ensemble with them, from discovery to generation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flexolmo_workspaces import TRAINING
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import expertctl
from expertctl import DiscoverySettings, Reporter, UserError, load_model
from expertctl.core.artefacts.files import read_json
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.testing import tiny_model_folder
from expertctl.core.text.clustering.clusterer import Clusterer, unit_rows
from expertctl.core.text.tokenizer import TextEncoder
from expertctl.experts.training.run import train_run
from expertctl.merge.ensemble.cluster_mixing import ClusterMixer, ClusterRouting, fit_temperature
from expertctl.workspace import Workspace

LAW = "the court held that the contract of the parties is void and the appeal was dismissed with costs"
CODE = "def add(first, second): return first + second for value in range(count): print(value)"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Return a workspace with an expert for each of two clusters."""
    root = tmp_path_factory.mktemp("cbtm") / "ws"
    root.mkdir()
    for part, count in (("train", 24), ("valid", 8)):
        texts = [f"{(LAW, CODE)[number % 2]} {number} {(LAW, CODE)[number % 2]}" for number in range(count)]
        (root / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    domain = {"train": "train.jsonl", "valid": "valid.jsonl"}
    (root / "expertctl.yaml").write_text(json.dumps({"domains": {"mixed": domain}, "training": TRAINING}))
    workspace = Workspace(root)
    workspace.seed(tiny_model_folder(root / ".origin", "olmo2"))
    workspace.discover("campus", 2, DiscoverySettings(jobs=1))
    workspace = Workspace(root)
    for spec in workspace.experts.branch_clusters("campus"):
        train_run(workspace.experts / spec.name, Reporter(), lambda: False)
    workspace.merge("forest", method="ensemble", options={"mixer": "clusters", "every": 4})
    return workspace


def mixer_of(made: Workspace, **changes: object) -> ClusterMixer:
    mixer = load_model(made.generalists / "forest")[0].mixer
    return replace(mixer, routing=replace(mixer.routing, **changes))


def naive_weights(mixer: ClusterMixer, clusterer: Clusterer, tokens: list[int]) -> np.ndarray:
    """The formula for every prefix, from its whole text."""
    routing = mixer.routing
    rows = [np.zeros(len(routing.clusters))]
    for count in range(1, len(tokens) + 1):
        if not routing.is_update_due(count):
            rows.append(rows[-1])
            continue
        text = mixer.reader.tokenizer.decode(tokens[:count], skip_special_tokens=False)
        point = unit_rows(clusterer.sums([text]))[0].astype(np.float64)
        squares = ((point - clusterer.centres[list(routing.clusters)]) ** 2).sum(axis=1)
        power = 1 if routing.distance == "squared" else 2
        scores = -(squares**power) / routing.temperature if point.any() else np.zeros(len(squares))
        if routing.top_k == 1 and point.any():
            scores = np.where(np.arange(len(scores)) == scores.argmax(), scores, -np.inf)
        rows.append(scores)
    stacked = np.stack(rows[1:])
    return np.exp(stacked) / np.exp(stacked).sum(axis=1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    distance=st.sampled_from(["squared", "released"]),
    top_k=st.sampled_from([None, 1]),
    begin=st.integers(0, 40),
)
def test_weights_are_the_formula_however_the_text_arrives(
    made: Workspace, cuts: list[int], distance: str, top_k: int | None, begin: int
) -> None:
    mixer = mixer_of(made, distance=distance, top_k=top_k, temperature=0.3)
    clusterer = Clusterer.read(made.generalists / "forest")
    tokens = TextEncoder.of_folder(made.layout.seed).encode([f"{CODE} né {LAW}"])[0][begin : begin + sum(cuts)]
    texts, pieces = None, []
    for cut in cuts:
        ids, tokens_left = tokens[:cut], tokens[cut:]
        if ids:
            weights, texts = mixer.route(torch.tensor([ids]), None, texts)
            pieces.append(weights[0].exp().numpy())
        tokens = tokens_left
    whole = TextEncoder.of_folder(made.layout.seed).encode([f"{CODE} né {LAW}"])[0][begin : begin + sum(cuts)]
    assert np.concatenate(pieces) == pytest.approx(naive_weights(mixer, clusterer, whole), abs=1e-5)


def test_padding_is_not_read(made: Workspace) -> None:
    mixer = mixer_of(made)
    ids = TextEncoder.of_folder(made.layout.seed).encode([LAW])[0][:12]
    plain = mixer.route(torch.tensor([ids]))[0]
    padded = torch.tensor([[0, 0, 0, *ids]])
    mask = torch.tensor([[0, 0, 0, *[1] * len(ids)]])
    assert mixer.route(padded, mask)[0][:, 3:].equal(plain)


def test_the_ensemble_mixes_probabilities_by_these_weights(made: Workspace) -> None:
    model, tokenizer = load_model(made.generalists / "forest")
    ids = tokenizer(LAW, return_tensors="pt")["input_ids"][:, :30]
    weights = model.mixer.route(ids)[0].exp()
    members = [load_model(made.experts / name)[0] for name in model.expert_names]
    with torch.inference_mode():
        parts = [member(input_ids=ids).logits.double().softmax(-1) for member in members]
        logits = model(input_ids=ids).logits
    mixture = sum(weights[..., index, None].double() * part for index, part in enumerate(parts))
    torch.testing.assert_close(logits.double(), mixture.log(), atol=1e-5, rtol=0)
    gathered = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(model.target_log_probs(ids), gathered, atol=1e-5, rtol=0)
    assert model.responsibilities(ids).sum(-1).allclose(torch.ones(1, ids.shape[1] - 1))


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_caches_gives_what_the_whole_text_gives(made: Workspace, beams: int) -> None:
    model, tokenizer = load_model(made.generalists / "forest")
    model.mixer = mixer_of(made, top_k=1, every=2)
    prompts = [LAW[:30], CODE[:52]]
    tokenizer.padding_side = "left"
    given_ = tokenizer(prompts, return_tensors="pt", padding=True)
    settings_ = {"max_new_tokens": 14, "do_sample": False, "num_beams": beams}
    cached = model.generate(**given_, use_cache=True, **settings_)
    assert cached.equal(model.generate(**given_, use_cache=False, **settings_))


def test_experts_without_weight_do_not_run(made: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(made.generalists / "forest")
    model.mixer = mixer_of(made, top_k=1, every=1)
    ran: list[int] = []
    for index, member in enumerate(model.members):
        member.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    ids = tokenizer(LAW, return_tensors="pt")["input_ids"]
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    assert len(ran) == 1


def test_the_fitted_temperature_is_the_best_of_many(made: Workspace) -> None:
    model, _ = load_model(made.generalists / "forest")
    domain = [(TextEncoder.of_folder(made.layout.seed).encode([text])[0], text) for text in (LAW, CODE)]
    texts = []
    with torch.inference_mode():
        for ids, _text in domain:
            rows = torch.tensor([ids])
            scores = [
                member(input_ids=rows).logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[0, :, 0]
                for member in model.members
            ]
            texts.append((ids, torch.stack(scores).double().numpy()))

    def loss(temperature: float) -> float:
        mixer = mixer_of(made, temperature=temperature)
        total = 0.0
        for ids, scores_KT in texts:
            joint = mixer.route(torch.tensor([ids[:-1]]))[0][0].double().numpy() + scores_KT.T
            total -= float(np.logaddexp.reduce(joint, axis=1).sum())
        return total

    best = fit_temperature(model.mixer, texts)
    assert loss(best) <= min(loss(10**power) for power in np.linspace(-3, 1, 20)) + 1e-3


def test_saving_again_and_removing_an_expert(made: Workspace, tmp_path: Path) -> None:
    model, tokenizer = load_model(made.generalists / "forest")
    config = json.loads((made.generalists / "forest" / "config.json").read_text())
    assert config["mixer_settings"]["distance"] == "squared"
    assert config["mixer_settings"]["temperature"] > 0
    ids = tokenizer(LAW, return_tensors="pt")["input_ids"]
    model.save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    expertctl.register_auto_classes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    with torch.inference_mode():
        assert again(input_ids=ids).logits.equal(model(input_ids=ids).logits)
        alone, _ = load_model(made.generalists / "forest", without=["campus-0"])
        expected = load_model(made.experts / "campus-1")[0](input_ids=ids).logits.log_softmax(-1)
        torch.testing.assert_close(alone(input_ids=ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"prior": "uniform"}, "has no option 'prior'"),
        ({"clusters": "campsu"}, "no set of clusters 'campsu'"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be greater than 0"),
        ({"top_k": 3}, "top_k is 3"),
        ({"every": 0}, "every is 0"),
    ],
)
def test_impossible_cluster_ensembles_are_refused(made: Workspace, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        made.merge("other", method="ensemble", options={"mixer": "clusters", **options})
    assert not (made.generalists / "other").exists()


def test_the_manifest_records_fitted_settings_to_repeat_the_merge_without_text(made: Workspace) -> None:
    manifest = read_manifest(made.generalists / "forest")
    options, config = manifest.merged.options, read_json(made.generalists / "forest" / "config.json")
    assert options["clusters"] == "campus"
    assert options["temperature"] == config["mixer_settings"]["temperature"]
    assert manifest.merged.weights == {}
    again = made.merge("again", method="ensemble", options=options)
    assert again.merged.fitted_on == ()
    assert read_json(made.generalists / "again" / "config.json") == config
    assert again.digest == manifest.digest


def test_clusters_that_no_text_can_be_followed_by_are_refused(made: Workspace) -> None:
    path = made.root / "clusters" / "campus" / "clusters.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"by": "hidden_states"}))
        with pytest.raises(UserError, match="'campus' was made by hidden_states"):
            made.merge("other", method="ensemble", options={"mixer": "clusters"})
    finally:
        path.write_text(before)


def test_routing_is_due_early_and_then_regularly() -> None:
    routing = ClusterRouting((0, 1), 0.1, every=8)
    assert [count for count in range(1, 25) if routing.is_update_due(count)] == [1, 2, 4, 8, 16, 24]
