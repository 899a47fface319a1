"""Training to coordinate: what it starts as, what stays, what moves, what is written, what is loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flexolmo_workspaces import OWNERS, make_flexolmo_workspace, train_here
from safetensors.torch import load_file

from expertctl import UserError, load_model
from expertctl.core.hooks.training import TrainingContext, TrainingText
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.testing import tiny_model_folder
from expertctl.plugins.methods.flexolmo.coordinated import BiasForm, CoordinatedFeedForward, coordinate, z_loss
from expertctl.plugins.methods.flexolmo.domain_embeddings import hidden_state_embedding, scale_to_unit_logits
from expertctl.plugins.methods.flexolmo.plugin import FlexOlmoTraining, prepare
from expertctl.workspace import Workspace

FAMILIES = ["olmo2", "llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma2"]


def tokens(count: int = 24, rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 250, (rows, count), generator=torch.Generator().manual_seed(seed))


def text(blocks: int = 3) -> Any:
    source = np.random.default_rng(1)

    class Blocks:
        block_size = 24

        def __init__(self, low: int) -> None:
            self.rows = source.integers(low, low + 100, (blocks, 25))

        def __len__(self) -> int:
            return blocks

        def block(self, index: int) -> Any:
            return self.rows[index]

    own, public = Blocks(0), Blocks(140)
    return TrainingText({"own": own}, lambda name: public, (), Path())


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_it_is_the_seed(tmp_path: Path, family: str) -> None:
    folder = tiny_model_folder(tmp_path / family, family)
    seed, _ = load_model(folder, dtype="float32")
    expected = seed(input_ids=tokens()).logits
    model, _ = load_model(folder, dtype="float32")
    part = prepare(TrainingContext(model, FlexOlmoTraining(public="public"), text()))
    logits = part.module(input_ids=tokens()).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_only_the_owners_half_is_trained_and_has_optimiser_state(model_folder: Path) -> None:
    model, _ = load_model(model_folder, dtype="float32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    part = prepare(TrainingContext(model, FlexOlmoTraining(public="public"), text()))
    optimiser = torch.optim.AdamW(list(part.parameters.values()), lr=0.1)
    assert {id(parameter) for parameter in part.parameters.values()} == {
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    }
    for _ in range(3):
        loss = part.module(input_ids=tokens()).logits.square().mean() + part.auxiliary_loss()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    frozen = {
        name.replace(".public.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".own." not in name and not name.endswith((".row", ".bias"))
    }
    assert frozen.keys() == before.keys()
    for name, tensor in frozen.items():
        assert torch.equal(tensor, before[name]), name
    feed_forward = sum(tensor.numel() for name, tensor in before.items() if ".mlp." in name)
    state = sum(value.numel() for moments in optimiser.state.values() for value in moments.values() if value.dim())
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    assert state == 2 * (feed_forward + layers * width)  # biases have no dimension
    assert all(not torch.equal(tensor, before[name]) for name, tensor in part.tensors().items())


def test_the_joined_feed_forward_equals_a_softmax_over_two(model_folder: Path) -> None:
    model, _ = load_model(model_folder, dtype="float32")
    (first, *_) = coordinate(model, torch.randn(2, 16), bias="clamp")
    with torch.no_grad():
        first.logit.bias.fill_(-0.7)
        for parameter in first.own.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(2, 5, 16)
    logits = torch.stack([torch.zeros(2, 5), x @ first.logit.row - 0.7], dim=-1).double()
    share = logits.softmax(dim=-1)
    expected = share[..., :1] * first.public(x).double() + share[..., 1:] * first.own(x).double()
    torch.testing.assert_close(first(x).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z_loss([first]).double(), logits.logsumexp(dim=-1).square().mean(), rtol=1e-5, atol=1e-6)


def test_a_positive_bias_counts_as_none(model_folder: Path) -> None:
    model, _ = load_model(model_folder, dtype="float32")
    (first, *_) = coordinate(model, torch.zeros(2, 16), bias="clamp")
    x = torch.randn(1, 4, 16)
    plain = first(x)
    with torch.no_grad():
        first.logit.bias.fill_(3.0)
    assert torch.equal(first(x), plain)


@pytest.mark.parametrize(
    ("form", "raw", "moves"), [("clamp", 3.0, False), ("softplus", 3.0, True), ("softplus", -3.0, True)]
)
def test_only_a_softplus_bias_has_a_gradient_everywhere(
    model_folder: Path, form: BiasForm, raw: float, moves: bool
) -> None:
    model, _ = load_model(model_folder, dtype="float32")
    (first, *_) = coordinate(model, torch.zeros(2, 16), bias=form)
    with torch.no_grad():
        first.logit.bias.fill_(raw)
    (gradient,) = torch.autograd.grad(first.logit(torch.randn(1, 4, 16)).sum(), first.logit.bias)
    assert (float(gradient) != 0) == moves
    assert float(first.logit.non_positive_bias().detach()) <= 0


def test_rows_have_logits_of_size_one_and_tell_the_texts_apart(model_folder: Path) -> None:
    model, _ = load_model(model_folder, dtype="float32")
    source = np.random.default_rng(0)
    own = [source.integers(0, 60, 32) for _ in range(6)]
    public = [source.integers(150, 250, 32) for _ in range(6)]
    embedding = hidden_state_embedding(model, own, public)
    inputs: dict[str, list[torch.Tensor]] = {"own": [], "public": []}
    parts = coordinate(model, embedding.rows, bias="none")
    for name, blocks in (("own", own), ("public", public)):
        for block in blocks:
            model.train()(input_ids=torch.from_numpy(block[None]))
            inputs[name].append(torch.stack([part.logits_BT for part in parts]).flatten(1).detach())
    logits = {name: torch.cat(pieces, dim=1) for name, pieces in inputs.items()}
    both = torch.cat([logits["own"], logits["public"]], dim=1)
    torch.testing.assert_close(both.square().mean(dim=1).sqrt(), torch.ones(2), atol=0.05, rtol=0)
    assert (logits["own"].mean(dim=1) > logits["public"].mean(dim=1)).all()
    again = scale_to_unit_logits(load_model(model_folder, dtype="float32")[0], embedding.rows * 7, [*own, *public])
    torch.testing.assert_close(again, embedding.rows, atol=1e-4, rtol=1e-4)


def test_an_expert_holds_only_what_the_owner_trained(flexolmo_workspace: Workspace) -> None:
    seed = load_file(flexolmo_workspace.layout.seed / "model.safetensors")
    for owner in OWNERS:
        folder = flexolmo_workspace.experts / owner
        tensors = load_file(folder / "model.safetensors")
        assert tensors.keys() == {name for name in seed if ".mlp." in name}
        router = load_file(folder / "router.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in router.items()} == {
            "rows": (2, 16),
            "biases": (2,),
            "domain": (2, 16),
            "public": (2, 16),
        }
        assert (router["biases"] <= 0).all()
        manifest = read_manifest(folder)
        assert manifest.trainable == "flexolmo"
        assert manifest.tensors.keys() == {*tensors, *router}


def test_a_trained_expert_is_loaded_as_trained(flexolmo_workspace: Workspace) -> None:
    folder = flexolmo_workspace.experts / "prose"
    trained, _ = load_model(folder, dtype="float32")
    assert any(isinstance(module, CoordinatedFeedForward) for module in trained.modules())
    losses = read_manifest(folder).metrics["validation_loss"]
    dense, _ = load_model(folder, dtype="float32", as_trained=False)
    assert not any(isinstance(module, CoordinatedFeedForward) for module in dense.modules())
    blocks = flexolmo_workspace.data.validation(["prose"])[0].blocks
    from expertctl.core.models.scoring import token_log_probs

    with torch.inference_mode():
        scores = [-token_log_probs(trained, torch.from_numpy(batch.tokens)) for batch in blocks.windows(4, limit=2)]
    assert float(torch.cat([score.flatten() for score in scores]).mean()) == pytest.approx(losses["prose"], abs=1e-4)


def test_public_text_must_be_named_where_the_seed_was_imported(flexolmo_workspace: Workspace) -> None:
    with pytest.raises(UserError, match="--option public=DOMAIN"):
        train_here(flexolmo_workspace, "nowhere", domain="prose", trains="flexolmo")


@pytest.mark.parametrize(
    "options",
    [
        {"embedding": "none"},
        {"public": "public", "bias": "none"},
        {"public": "public", "bias": "softplus"},
        {"public": "public", "coordinate": False},
    ],
)
def test_the_papers_ablations_can_be_configured(tmp_path: Path, options: dict[str, Any]) -> None:
    workspace = make_flexolmo_workspace(tmp_path / "w", owners=("prose",), options=options)
    router = load_file(workspace.experts / "prose" / "router.safetensors")
    if options.get("embedding") == "none":
        assert router.keys() == {"rows", "biases"}
    if options.get("bias") == "softplus":
        assert (router["biases"] < 0).all()
    elif "bias" in options or "coordinate" in options:
        assert not router["biases"].any()
