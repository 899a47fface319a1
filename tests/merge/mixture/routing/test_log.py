"""What routers decide, the losses on it, training forms of routers, reports, experts switched off."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from flexolmo_workspaces import OWNERS, tune_here
from safetensors.torch import load_file

from expertctl import UserError, load_model
from expertctl.core.hooks.training import TrainingContext
from expertctl.core.testing import tiny_model_folder
from expertctl.merge.merging import merge_recipe
from expertctl.merge.mixture.routing.log import (
    Decision,
    RoutingLog,
    SampledTop1,
    balance_loss,
    routers_of,
    routing_measures,
    train_with_all_experts,
    z_loss,
)
from expertctl.merge.mixture.routing.report import DomainRouting, RoutingReport, routing_of
from expertctl.merge.mixture.routing.switching import without_experts
from expertctl.merge.recipes.recipe import Recipe, whole_models
from expertctl.plugins.methods.mixture_tuning import MixtureTraining, RouterTuning, prepare_mixture, prepare_router
from expertctl.workspace import Workspace

TOKENS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))


def mixture(folder: Path, family: str = "llama", count: int = 3, **options: Any) -> Any:
    base = tiny_model_folder(folder / "base", family)
    names = [f"e{number}" for number in range(count)]
    models = {"base": base, **{name: shutil.copytree(base, folder / name) for name in names}}
    given = {"router": "random", "router_options": {"deviation": 1.0}, **options}
    merge_recipe(Recipe("mixture", models, whole_models(names), seed="base", scopes=(given,)), folder / "moe")
    return load_model(folder / "moe", dtype="float32")[0]


def decision(rows: int = 30, experts: int = 4, k: int = 2) -> Decision:
    logits = torch.randn(rows, experts, generator=torch.Generator().manual_seed(3))
    gates, chosen = logits.softmax(dim=-1).topk(k)
    return Decision(logits, gates / gates.sum(dim=-1, keepdim=True), chosen)


def test_losses_equal_the_definitions_written_out() -> None:
    routed = decision()
    experts = 4
    gates = np.zeros((30, experts))
    for row in range(30):
        for expert, gate in zip(routed.chosen[row].tolist(), routed.gates[row].tolist(), strict=True):
            gates[row, expert] = gate
    probabilities = np.exp(routed.logits.double().numpy())
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    expected = experts * (gates.mean(axis=0) * probabilities.mean(axis=0)).sum()
    assert float(balance_loss([routed, routed])) == pytest.approx(2 * expected, rel=1e-5)
    norms = np.log(np.exp(routed.logits.double().numpy()).sum(axis=1))
    assert float(z_loss([routed])) == pytest.approx((norms**2).mean(), rel=1e-5)
    entropy = -(probabilities * np.log(probabilities)).sum(axis=1).mean()
    assert float(routed.entropy()) == pytest.approx(entropy, rel=1e-5)
    counts = np.bincount(routed.chosen.flatten().numpy(), minlength=experts)
    np.testing.assert_allclose(routed.load().numpy(), counts / 60, rtol=1e-6)


def test_an_even_load_has_a_balance_loss_of_one_for_each_layer() -> None:
    logits = torch.zeros(8, 4)
    even = Decision(logits, torch.full((8, 2), 0.5), torch.tensor([[0, 1], [2, 3]] * 4))
    assert float(balance_loss([even])) == pytest.approx(1)


def test_parts_of_the_tokens_have_the_balance_loss_and_gradient_of_all() -> None:
    """Each process's part, with the means of both."""
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def decided(rows: slice) -> Decision:
        gates, chosen = logits[rows].softmax(dim=-1).topk(2)
        return Decision(logits[rows], gates / gates.sum(dim=-1, keepdim=True), chosen)

    whole = 2 * balance_loss([decided(slice(0, 30))])
    (gradient,) = torch.autograd.grad(whole, logits)
    parts = [decided(slice(0, 15)), decided(slice(15, 30))]
    seen: list[torch.Tensor] = []
    for part in parts:
        balance_loss([part, part], lambda value: seen.append(value) or value)
    losses = [balance_loss([part, part], lambda value: (seen[0] + seen[1]) / 2) for part in parts]
    mean = (losses[0] + losses[1]) / 2
    assert mean.item() == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(mean, logits)[0], gradient)


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen2", "qwen3", "gemma2", "gpt2"])
def test_routers_of_every_class_are_watched(tmp_path: Path, family: str) -> None:
    model = mixture(tmp_path, family)
    assert len(routers_of(model)) == 2
    with torch.inference_mode(), RoutingLog(model) as log:
        model(input_ids=TOKENS)
    for layer in log.layers():
        assert layer.logits.shape == (40, 3)
        assert layer.gates.shape == layer.chosen.shape == (40, 2)
        torch.testing.assert_close(layer.gates.sum(dim=-1), torch.ones(40))
    log.decisions.clear()
    model(input_ids=TOKENS)
    assert not log.decisions, "nothing is noted outside of the context"


def test_a_dense_model_has_no_router(model_folder: Path) -> None:
    with pytest.raises(UserError, match="is not a mixture of experts"):
        routers_of(load_model(model_folder)[0])


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen2", "qwen3", "gemma2"])
def test_switched_off_experts_take_no_part(tmp_path: Path, family: str) -> None:
    model = mixture(tmp_path, family, top_k=2)
    rows = {name: router.weight.detach().clone() for name, router in routers_of(model).items()}
    smaller = without_experts(model, ["e0", "e1", "e2"], ["e1"])
    for name, router in routers_of(smaller).items():
        assert torch.equal(router.weight, rows[name][[0, 2]])
        assert router.top_k == 2
    with torch.inference_mode(), RoutingLog(smaller) as log:
        smaller(input_ids=TOKENS)
    assert all(layer.num_experts == 2 for layer in log.layers())
    (only,) = {tuple(layer.chosen.shape) for layer in log.layers()}
    assert only == (40, 2)
    last = without_experts(smaller, ["e0", "e2"], ["e0"])
    assert last(input_ids=TOKENS).logits.isfinite().all()
    with pytest.raises(UserError, match="no expert is left"):
        without_experts(last, ["e2"], ["e2"])


def test_tuning_the_router_sends_tokens_through_all_experts_while_it_trains(tmp_path: Path) -> None:
    model = mixture(tmp_path, top_k=1)
    part = prepare_router(TrainingContext(model, RouterTuning(z_loss=0.1, balance=0.2)))
    assert set(part.parameters) == {f"{name}.weight" for name in routers_of(model)}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(part.parameters)
    for mode, expected in ((True, 3), (False, 1), (True, 3)):
        model.train(mode)
        with RoutingLog(model) as log:
            model(input_ids=TOKENS)
        assert {layer.chosen.shape[1] for layer in log.layers()} == {expected}
    decisions = log.layers()
    total = 0.2 * balance_loss(decisions) + 0.1 * z_loss(decisions)
    torch.testing.assert_close(part.auxiliary_loss(), total)
    part.auxiliary_loss().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in part.parameters.values())


def test_experts_can_stay_frozen(tmp_path: Path) -> None:
    for experts, moving in (("trained", True), ("frozen", False)):
        shutil.rmtree(tmp_path, ignore_errors=True)
        model = mixture(tmp_path)
        part = prepare_mixture(TrainingContext(model, MixtureTraining(experts=experts)))
        assert any(".experts." in name for name in part.parameters) == moving
        assert any(".gate." in name for name in part.parameters)
        assert any("q_proj" in name for name in part.parameters)


def test_sampling_is_for_mixtures_of_one_expert_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="routing 'sample' requires a mixture with top_k 1, and this one has 2"):
        prepare_mixture(TrainingContext(mixture(tmp_path, top_k=2), MixtureTraining(routing="sample")))


@pytest.mark.parametrize("routing", ["top_k", "sample"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen2", "gemma2", "gemma", "gpt2"])
def test_a_router_that_text_does_not_teach_is_told(
    tmp_path: Path, family: str, normalized: bool, routing: Literal["top_k", "sample"]
) -> None:
    model = mixture(tmp_path, family, top_k=1, normalized=normalized)
    torch.manual_seed(0)
    for expert, parameter in model.named_parameters():  # copies would all be worth the same
        if ".experts." in expert:
            parameter.data += 0.1 * torch.randn_like(parameter)
    part = prepare_mixture(TrainingContext(model, MixtureTraining(routing=routing)))
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    largest = [float(router.weight.grad.abs().max()) for router in routers_of(model).values()]
    if part.notes:
        assert max(largest) < 1e-6
    else:
        assert min(largest) > 1e-6
    assert bool(part.notes) == (family in ("olmo2", "gemma2") or (normalized and routing == "top_k"))


def test_advice_can_be_passed_to_the_trainer(tmp_path: Path) -> None:
    (note,) = prepare_router(TrainingContext(mixture(tmp_path, top_k=1), RouterTuning(all_experts=False))).notes
    assert "remove all_experts=false" in note
    assert "routing" not in note


def test_no_note_where_all_experts_teach_the_router(tmp_path: Path) -> None:
    assert prepare_router(TrainingContext(mixture(tmp_path, top_k=1), RouterTuning())).notes == ()


def test_sampling_draws_by_the_softmax_and_cools_down(tmp_path: Path) -> None:
    model = mixture(tmp_path, top_k=1)
    router = next(iter(routers_of(model).values()))
    hidden = torch.randn(1, 16).expand(4000, 16)
    plain = router(hidden)
    sampler = SampledTop1(router, 1e-2)
    model.train()
    torch.manual_seed(0)
    logits, gates, chosen = router(hidden)
    assert chosen.shape == gates.shape == (4000, 1)
    drawn = torch.bincount(chosen.flatten(), minlength=3) / 4000
    torch.testing.assert_close(drawn, logits[0].softmax(dim=-1), atol=0.03, rtol=0)
    warm = gates.mean()
    sampler.step = 1000
    assert router(hidden)[1].mean() > warm, "a colder softmax is nearer to a choice"
    model.eval()
    for actual, expected in zip(router(hidden), plain, strict=True):
        assert torch.equal(actual, expected)


def test_all_experts_only_while_training(tmp_path: Path) -> None:
    model = mixture(tmp_path, top_k=2)
    for router in routers_of(model).values():
        train_with_all_experts(router)
    expected = model.eval()(input_ids=TOKENS).logits
    model.train()(input_ids=TOKENS)
    torch.testing.assert_close(model.eval()(input_ids=TOKENS).logits, expected)


def test_reports_add_up_and_name_dead_experts(tmp_path: Path) -> None:
    model = mixture(tmp_path)
    routing = routing_of(model, [np.arange(12), np.arange(30, 50)])
    assert routing.tokens == 32
    np.testing.assert_allclose(np.sum(routing.load, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.sum(routing.gates, axis=1), 1, rtol=1e-5)
    dead = RoutingReport(
        ("a", "b"), {"x": DomainRouting(4, ((1.0, 0.0), (0.5, 0.5)), ((1.0, 0.0), (0.5, 0.5)), (0.0, 0.7))}
    )
    assert dead.dead() == [(0, "b")]
    assert dead.as_json()["domains"]["x"]["load"] == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize("options", [{}, {"experts": "frozen"}, {"routing": "sample", "balance": 0.1}], ids=str)
def test_a_mixture_of_whole_experts_is_trained_further(
    flexolmo_workspace: Workspace, tmp_path: Path, options: dict[str, Any]
) -> None:
    tag = "-".join(options.values() if not options or "experts" in options else ["sample"]) or "plain"
    base = f"btx-{tag}"
    top_k = 1 if "routing" in options else 2
    flexolmo_workspace.merge(
        base, method="btx", experts=OWNERS, options={"top_k": top_k, "router": "random"}, force=True
    )
    tuned = tune_here(
        flexolmo_workspace,
        f"{base}-trained",
        base,
        trains="mixture",
        domains=list(OWNERS),
        options=options,
        training={"tokens": 512},
        force=True,
    )
    before = load_file(flexolmo_workspace.generalists / base / "model.safetensors")
    after = load_file(tuned / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert any(".experts." in name for name in changed) == (options.get("experts") != "frozen")
    assert any("q_proj" in name for name in changed)
    assert any(".gate.weight" in name for name in changed)
    model, _ = load_model(tuned, dtype="float32")
    assert model.config.num_experts_per_tok == top_k


def test_training_logs_how_tokens_are_spread(flexolmo_workspace: Workspace) -> None:
    workspace = flexolmo_workspace
    if not (workspace.generalists / "logged-base").exists():
        workspace.merge("logged-base", method="flexolmo", experts=OWNERS, options={"top_k": 2})
    folder = tune_here(
        workspace,
        "logged",
        "logged-base",
        trains="mixture",
        domains=["public"],
        training={"tokens": 256, "log_every": 1},
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2
    for step in steps:
        assert 0 <= step["router_entropy"] <= math.log(4) + 1e-6
        assert 0 <= step["router_lowest_load"] <= 1 <= step["router_highest_load"] <= 4
        assert step["router_dead_experts"] in range(9)


def test_measures_are_those_of_the_definition() -> None:
    logits = torch.tensor([[2.0, 0.0, -9.0], [0.0, 2.0, -9.0]])
    gates, chosen = torch.ones(2, 1), torch.tensor([[0], [1]])
    measures = routing_measures([Decision(logits, gates, chosen)])
    p = logits.softmax(dim=-1)
    assert measures["router_entropy"] == pytest.approx(float(-(p * p.log()).sum(dim=-1).mean()), rel=1e-5)
    assert measures["router_highest_load"] == pytest.approx(1.5)
    assert measures["router_lowest_load"] == 0
    assert measures["router_dead_experts"] == 1
