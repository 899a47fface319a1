"""Private gradients, against the plainest loop over single examples and against ordinary training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from private_models import CONFIG, drawn, make_model, naive_gradients, private_loop

from expertctl import UserError
from expertctl.core.hooks.steps import Batch
from expertctl.core.text.token_store import TokenBlocks
from expertctl.experts.runs.trainable import all_parameters, matching_parameters
from expertctl.experts.training.checkpointing import restore_latest, save_checkpoint
from expertctl.experts.training.privacy.loop import PrivateTrainingLoop
from expertctl.experts.training.privacy.noise import NoiseSource
from expertctl.experts.training.steps.loop import TrainingLoop, next_token_loss


def tokens_of(blocks: TokenBlocks, chosen: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.stack([blocks.block(index) for index in chosen]))


def gradients(loop: PrivateTrainingLoop) -> dict[str, torch.Tensor]:
    loop._accumulate()
    return {name: parameter.grad.clone() for name, parameter in loop.parameters.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "tied", "olmo2", "qwen3"])
def test_without_noise_and_clipping_it_is_the_gradient_of_the_ordinary_loop(blocks: TokenBlocks, family: str) -> None:
    loop = private_loop(all_parameters(make_model(family)), blocks)
    chosen = drawn(loop)
    clipped = gradients(loop)

    ordinary = TrainingLoop(
        all_parameters(make_model(family)),
        blocks,
        CONFIG.model_copy(update={"batch_size": len(chosen), "accumulation": 1}),
    )
    ordinary._batch = lambda: ([0] * len(chosen), Batch(tokens_of(blocks, chosen)))  # type: ignore[method-assign]
    ordinary._accumulate()
    expected = CONFIG.batch_size * CONFIG.accumulation
    assert len(chosen) != expected, "else the two would agree whatever they divide by"
    for name, parameter in ordinary.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(clipped[name], parameter.grad * (len(chosen) / expected), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("trained", ["*", "*.mlp.*", "*norm*"])
def test_each_block_is_clipped_by_itself(blocks: TokenBlocks, trained: str) -> None:
    """In float64, against a loop over single examples."""
    model = make_model("llama").double()
    part = matching_parameters(model, [trained])
    twin = matching_parameters(copy.deepcopy(model), [trained])
    chosen = drawn(private_loop(part, blocks))
    alone = naive_gradients(
        lambda tokens: double_loss(twin.module, tokens), dict(twin.parameters), tokens_of(blocks, chosen)
    )
    norms = [torch.stack([gradient.square().sum() for gradient in example.values()]).sum().sqrt() for example in alone]
    clip = float(torch.stack(norms).median())

    model = make_model("llama").double()
    loop = private_loop(matching_parameters(model, [trained]), blocks, clip=clip)
    loop._loss = lambda batch: double_loss(model, batch.tokens)
    clipped = gradients(loop)
    cut = [min(1.0, clip / (float(norm) + 1e-6)) for norm in norms]
    assert sum(factor < 1 for factor in cut) >= 2, "some must be clipped"
    assert sum(factor == 1 for factor in cut) >= 2, "and some not"
    for name, gradient in clipped.items():
        expected = sum(factor * gradient[name] for factor, gradient in zip(cut, alone, strict=True))
        # the norms of the family compute in float32
        torch.testing.assert_close(gradient, expected / 8, atol=1e-7, rtol=1e-5)


def double_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def test_one_block_moves_the_sum_by_the_clip_at_most(blocks: TokenBlocks) -> None:
    """Which is what the noise is measured by: leave each drawn block out in turn."""
    clip = 0.05
    loop = private_loop(all_parameters(make_model("olmo2")), blocks, clip=clip)
    chosen = drawn(loop)

    def total(indices: list[int]) -> torch.Tensor:
        sums = {name: torch.zeros_like(parameter) for name, parameter in loop.parameters.items()}
        loop._add_clipped(sums, loop._load_blocks(np.array(indices)))
        return torch.cat([gradient.flatten() for gradient in sums.values()]).double()

    whole = total(chosen)
    moved = [float((whole - total([example for example in chosen if example != out])).norm()) for out in chosen]
    assert max(moved) <= clip * (1 + 1e-4)
    assert max(moved) > clip * 0.99, "and with so small a clip they reach it"


def test_noise_is_as_large_as_it_should_be_and_new_in_each_step_and_parameter(blocks: TokenBlocks) -> None:
    quiet = gradients(private_loop(all_parameters(make_model("llama")), blocks, clip=0.5))
    loop = private_loop(all_parameters(make_model("llama")), blocks, clip=0.5, noise=3.0)
    noisy = gradients(loop)
    expected = CONFIG.batch_size * CONFIG.accumulation
    noise = torch.cat([((noisy[name] - quiet[name]) * expected).flatten() for name in quiet])
    assert float(noise.std()) == pytest.approx(3.0 * 0.5, rel=0.05)
    assert abs(float(noise.mean())) < 0.05
    shape = next(iter(loop.parameters.values())).shape
    drawn_noise = [loop._source.normal(f"noise/{step}/{name}", shape) for step in (0, 1) for name in loop.parameters]
    assert len({noise.numpy().tobytes() for noise in drawn_noise}) == len(drawn_noise)


def test_frozen_parts_get_no_gradient_and_never_move(blocks: TokenBlocks) -> None:
    model = make_model("olmo2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loop = private_loop(matching_parameters(model, ["*.mlp.*"]), blocks, noise=1.0, clip=1.0)
    for _ in loop.steps():
        pass
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            assert not torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is None
            assert getattr(parameter, "grad_sample", None) is None
            assert torch.equal(parameter, before[name]), name


def test_a_step_that_draws_nothing_is_noise_alone(blocks: TokenBlocks) -> None:
    loop = private_loop(all_parameters(make_model("llama")), blocks, noise=1.0, clip=1.0)
    loop._source = Barren(loop._source.key)
    loss = loop._accumulate()
    assert float(loss) == 0.0
    assert all(
        float(parameter.grad.abs().sum()) > 0 for parameter in loop.parameters.values() if parameter.grad is not None
    )
    assert loop.accountant.history[0][2] == 1, "it costs what any step costs"


class Barren(NoiseSource):
    def sampled_indices(self, purpose: str, size: int, rate: float) -> Any:
        return np.empty(0, dtype=np.int64)


@pytest.mark.parametrize("stop", [1, 4])
def test_going_on_from_a_checkpoint_gives_the_same_bits_and_the_same_account(
    blocks: TokenBlocks, tmp_path: Path, stop: int
) -> None:
    def fresh(seed: int = 0) -> PrivateTrainingLoop:
        return private_loop(all_parameters(make_model("llama")), blocks, noise=1.0, clip=0.5)

    whole = fresh()
    losses = [float(report.loss) for report in whole.steps()]
    first = fresh()
    begun = []
    for report in first.steps():
        begun.append(float(report.loss))
        if report.step == stop:
            break
    save_checkpoint(first, tmp_path / "state")
    second = fresh()
    assert restore_latest(second, tmp_path / "state") == stop
    assert second.accountant.history == [(1.0, whole.mechanism.rate, stop)]
    assert begun + [float(report.loss) for report in second.steps()] == losses
    assert second.accountant.history == whole.accountant.history == [(1.0, whole.mechanism.rate, CONFIG.steps)]
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


def test_an_account_of_other_noise_is_refused(blocks: TokenBlocks, tmp_path: Path) -> None:
    first = private_loop(all_parameters(make_model("llama")), blocks, noise=0.5, clip=0.5)
    next(first.steps())
    save_checkpoint(first, tmp_path / "state")
    second = private_loop(all_parameters(make_model("llama")), blocks, noise=1.0, clip=0.5)
    with pytest.raises(UserError, match="does not match 1 steps of this run"):
        restore_latest(second, tmp_path / "state")


def test_the_reported_loss_is_the_mean_over_the_drawn_examples(blocks: TokenBlocks) -> None:
    loop = private_loop(all_parameters(make_model("llama")), blocks)
    tokens = tokens_of(blocks, drawn(loop))
    with torch.no_grad():
        expected = next_token_loss(loop.module, Batch(tokens))
    assert float(loop._accumulate()) == pytest.approx(float(expected), rel=1e-5)
