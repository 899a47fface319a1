"""What cannot train privately is refused by name, and what can is not."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from private_models import CONFIG, changed, drawn, make_model, naive_gradients, private_loop
from torch import nn

from expertctl import UserError
from expertctl.core.hooks.steps import Batch
from expertctl.core.hooks.training import TrainablePart
from expertctl.core.text.token_store import TokenBlocks
from expertctl.experts.runs.trainable import all_parameters, matching_parameters
from expertctl.experts.training.steps.loop import next_token_loss
from expertctl.plugins.methods.flexolmo.coordinated import coordinate
from expertctl.plugins.methods.flexolmo.plugin import CoordinatedPart


class Small(nn.Module):
    """A language model of one hidden layer, with room for something odd in the middle."""

    def __init__(self, middle: nn.Module, *, apply: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(vocab_size=64)
        self.embedding = nn.Embedding(64, 8)
        self.middle = middle
        self.apply_middle = apply or (lambda layer, hidden: layer(hidden))
        self.head = nn.Linear(8, 64)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        hidden_BTd = self.embedding(input_ids)
        return SimpleNamespace(logits=self.head(self.apply_middle(self.middle, hidden_BTd)))


class Bare(nn.Module):
    """Holds a matrix that others use past its own forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))


class Mixing(nn.Module):
    """Subtracts the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, hidden_BTd: torch.Tensor) -> torch.Tensor:
        return self.weight * (hidden_BTd - hidden_BTd.mean(dim=0, keepdim=True))


class Choosing(nn.Module):
    """Takes a number out of what it is given, which cannot be done for many examples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, hidden_BTd: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden_BTd * (1 + 0 * hidden_BTd.flatten()[0].item())


def batch_norm() -> Small:
    return Small(nn.BatchNorm1d(8), apply=lambda layer, hidden: layer(hidden.transpose(1, 2)).transpose(1, 2))


REFUSED = {
    "batch norm": (
        batch_norm,
        "layer 'middle' (BatchNorm1d) cannot train with differential privacy: batch normalisation.*keeps statistics",
    ),
    "used past its forward pass": (
        lambda: Small(Bare(), apply=lambda layer, hidden: hidden @ layer.weight),
        "parameter 'middle.weight' cannot train .*part of its gradient does not pass through the layer that owns it",
    ),
    "examples that meet": (
        lambda: Small(Mixing()),
        "layer 'middle' (Mixing) .*its output for one example depends on the other examples",
    ),
    "tokens without their example": (
        lambda: Small(
            nn.Linear(8, 8),
            apply=lambda layer, hidden: layer(hidden.flatten(0, 1)).view_as(hidden),
        ),
        "layer 'middle' (Linear) .*its input has 48 rows for a batch of 3",
    ),
    "several inputs": (
        lambda: Small(nn.Bilinear(8, 8, 8), apply=lambda layer, hidden: layer(hidden, hidden)),
        "layer 'middle' (Bilinear) .*more than one input tensor",
    ),
    "a choice": (
        lambda: Small(Choosing()),
        "layer 'middle' (Choosing) .*cannot compute per-example gradients",
    ),
    "fused experts": (
        lambda: make_model("mixtral"),
        "layer 'model.layers.0.mlp.gate' (MixtralTopKRouter) .*its input has 48 rows for a batch of 3",
    ),
    "positions for the whole batch": (
        lambda: make_model("gpt2", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        "layer 'transformer.wpe' (Embedding) .*its input has 1 rows for a batch of 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_layer_and_the_reason(blocks: TokenBlocks, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")) as refused:
        private_loop(all_parameters(make()), blocks)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("case", sorted(set(REFUSED) - {"batch norm"}))
def test_one_block_at_a_time_any_layer_can_train(blocks: TokenBlocks, case: str) -> None:
    """And the gradient is that of a loop over single examples."""
    model = REFUSED[case][0]()
    twin = all_parameters(copy.deepcopy(model))
    single = changed(CONFIG, batch_size=1, accumulation=8)
    loop = private_loop(all_parameters(model), blocks, clip=0.25, config=single)
    loop._accumulate()
    tokens = torch.from_numpy(np.stack([blocks.block(index) for index in drawn(loop)]))
    alone = naive_gradients(lambda tokens: next_token_loss(twin.module, Batch(tokens)), dict(twin.parameters), tokens)
    norms = [float(torch.stack([gradient.square().sum() for gradient in each.values()]).sum().sqrt()) for each in alone]
    assert max(norms) > 0.25, "something is clipped"
    for name, parameter in loop.parameters.items():
        expected = sum(min(1.0, 0.25 / (norm + 1e-6)) * each[name] for norm, each in zip(norms, alone, strict=True))
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected / 8, atol=1e-6, rtol=1e-3)


def test_batch_normalisation_is_refused_for_single_blocks_too(blocks: TokenBlocks) -> None:
    with pytest.raises(UserError, match="keeps statistics of the text"):
        private_loop(all_parameters(batch_norm()), blocks, config=changed(CONFIG, batch_size=1))


def test_one_block_at_a_time_gives_what_several_give(blocks: TokenBlocks) -> None:
    several = private_loop(all_parameters(make_model("llama")), blocks, clip=0.5, noise=1.0)
    single = private_loop(
        all_parameters(make_model("llama")),
        blocks,
        clip=0.5,
        noise=1.0,
        config=changed(CONFIG, batch_size=1, accumulation=8),
    )
    assert float(several._accumulate()) == pytest.approx(float(single._accumulate()), rel=1e-5)
    for name, parameter in several.parameters.items():
        other = single.parameters[name].grad
        assert parameter.grad is not None
        assert other is not None
        torch.testing.assert_close(parameter.grad, other, atol=1e-6, rtol=1e-4)


def test_a_loss_over_the_whole_batch_is_refused(blocks: TokenBlocks) -> None:
    class WithLoss(TrainablePart):
        def auxiliary_loss(self) -> torch.Tensor:
            return torch.zeros(())

    part = all_parameters(make_model("llama"))
    odd = WithLoss(part.module, part.parameters)
    with pytest.raises(UserError, match="a loss over the whole batch"):
        private_loop(odd, blocks)
    private_loop(odd, blocks, config=changed(CONFIG, batch_size=1))  # a batch is one example


@pytest.mark.parametrize(
    ("family", "trained"), [("gpt2", "transformer.h.*"), ("mixtral", "*self_attn*"), ("tied", "*")]
)
def test_parts_of_such_models_can_train(blocks: TokenBlocks, family: str, trained: str) -> None:
    loop = private_loop(matching_parameters(make_model(family), [trained]), blocks, noise=1.0, clip=1.0)
    assert next(loop.steps()).step == 1


def test_dropout_does_not_look_like_a_layer_in_which_examples_meet(blocks: TokenBlocks) -> None:
    model = make_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5)
    private_loop(matching_parameters(model, ["transformer.h.*"]), blocks)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("clip", [float("inf"), 0.3])
def test_an_owners_feed_forward_with_its_router_and_their_loss(blocks: TokenBlocks, clip: float) -> None:
    """FlexOlmo's part against a loop over single examples, the router's loss included."""

    def part() -> TrainablePart:
        model = make_model("olmo2")
        rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)) * 0.3
        parts = coordinate(model, rows, bias="clamp")
        with torch.no_grad():
            for block in parts:
                block.logit.bias.fill_(-0.1)  # at 0 the clamp has no slope
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return CoordinatedPart(model, parameters, parts, 0.5, None)

    loop = private_loop(part(), blocks, clip=clip)
    assert any(re.search(r"logit\.row", name) for name in loop.parameters)
    loop._accumulate()
    chosen = drawn(loop)
    twin = part()
    auxiliary = twin.auxiliary_loss
    alone = naive_gradients(
        lambda tokens: next_token_loss(twin.module, Batch(tokens)) + auxiliary(),
        dict(twin.parameters),
        torch.from_numpy(np.stack([blocks.block(index) for index in chosen])),
    )
    norms = [float(torch.stack([gradient.square().sum() for gradient in each.values()]).sum().sqrt()) for each in alone]
    expected_size = CONFIG.batch_size * CONFIG.accumulation
    for name, parameter in loop.parameters.items():
        expected = sum(min(1.0, clip / (norm + 1e-6)) * each[name] for norm, each in zip(norms, alone, strict=True))
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected / expected_size, atol=1e-6, rtol=1e-3)
