"""Stages of shorter blocks, against a plain loop over the same text in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from expertctl import UserError
from expertctl.core.config.phases import require_phases
from expertctl.core.config.settings import TrainingConfig, validate_settings
from expertctl.core.text.block_order import BalancedUnion, Position, cut, draw
from expertctl.core.text.token_store import EncodedDocument, Row, TokenBlocks, TokenStore, write_part
from expertctl.experts.runs.trainable import all_parameters
from expertctl.experts.training.checkpointing import restore_latest, save_checkpoint
from expertctl.experts.training.distributed.ranks import Ranks
from expertctl.experts.training.steps.guards import Guards
from expertctl.experts.training.steps.loop import TrainingLoop
from expertctl.experts.training.steps.schedule import learning_rate, progress_at
from expertctl.plugins.basics.infilling import Infilling

SETTINGS: dict[str, Any] = {
    "tokens": 12 * 2 * 2 * 32,
    "sequence_length": 32,
    "batch_size": 2,
    "accumulation": 2,
    "learning_rate": 1e-2,
    "device": "cpu",
    "stages": [{"share": 0.25, "sequence_length": 8}, {"share": 0.34, "sequence_length": 16}],
}
CONFIG = validate_settings(TrainingConfig, SETTINGS, "training")
LENGTHS = [8] * 3 + [16] * 4 + [32] * 5  # 12 steps; 0.59 of them is 7.08


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=64))


def blocks_in(folder: Path, seed: int = 0) -> TokenBlocks:
    folder.mkdir()
    ids = np.random.default_rng(seed).integers(1, 64, size=(60, 30)).tolist()
    write_part(folder, [EncodedDocument("x" * 30, row) for row in ids], separator=0, vocabulary=64)
    return TokenBlocks(TokenStore(folder), CONFIG.sequence_length)


@pytest.fixture
def blocks(tmp_path: Path) -> TokenBlocks:
    return blocks_in(tmp_path / "part")


def losses_of(loop: TrainingLoop, steps: int | None = None) -> list[float]:
    losses = []
    for report in loop.steps():
        losses.append(float(report.loss))
        if report.step == steps:
            break
    return losses


@pytest.mark.parametrize("number_of_domains", [1, 2])
def test_losses_and_weights_are_those_of_a_plain_loop_over_pieces(tmp_path: Path, number_of_domains: int) -> None:
    parts = [blocks_in(tmp_path / str(number), seed=number) for number in range(number_of_domains)]
    text = BalancedUnion(parts) if number_of_domains > 1 else parts[0]
    loop = TrainingLoop(all_parameters(tiny_model()), text, CONFIG)
    losses = losses_of(loop)

    model = tiny_model().train()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.epsilon)
    position = Position()
    for step, length in enumerate(LENGTHS):
        total = torch.zeros(())
        for _ in range(4):  # blocks of a step, as without stages
            tokens = draw(text, position, CONFIG.seed).tokens
            position = position.advanced(1, len(text))
            for begin in range(0, 32, length):
                piece = torch.from_numpy(tokens[begin : begin + length + 1])[None]
                logits = model(piece[:, :-1]).logits
                total = total + torch.nn.functional.cross_entropy(logits[0], piece[0, 1:], reduction="sum") / 128
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(CONFIG, progress_at(CONFIG, step))
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        assert losses[step] == pytest.approx(total.item(), abs=1e-5), step
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loop.parameters[name], parameter, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stop", [1, 3, 5, 7, 10])
def test_going_on_from_a_checkpoint_of_any_stage_gives_the_same_bits(
    blocks: TokenBlocks, tmp_path: Path, stop: int
) -> None:
    whole, first, second = (TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG) for _ in range(3))
    losses = losses_of(whole)
    begun = losses_of(first, stop)
    save_checkpoint(first, tmp_path / "state")
    assert restore_latest(second, tmp_path / "state") == stop
    assert begun + losses_of(second) == losses
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name
    for name, tensor in whole.optimiser_state().items():
        assert torch.equal(tensor, second.optimiser_state()[name]), name


def test_processes_share_the_pieces_of_a_batch(blocks: TokenBlocks) -> None:
    def batch(ranks: Ranks) -> list[list[int]]:
        loop = TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG)
        loop.ranks = ranks
        return loop._batch()[1].tokens.tolist()

    alone, parts = batch(Ranks()), [batch(Ranks(rank, 2)) for rank in range(2)]
    assert len(alone) == 8
    assert sorted(parts[0] + parts[1]) == sorted(alone)
    assert len(parts[0]) == len(parts[1])


@given(st.integers(1, 9), st.integers(1, 20))
def test_pieces_predict_every_token_of_the_block_once(count: int, length: int) -> None:
    tokens = np.arange(count * length + 1)
    pieces = cut(Row(tokens), length)
    assert [len(piece.tokens) for piece in pieces] == [length + 1] * count
    assert np.concatenate([piece.tokens[1:] for piece in pieces]).tolist() == tokens[1:].tolist()
    assert [piece.tokens[0] for piece in pieces] == tokens[:-1:length].tolist()


@given(st.lists(st.floats(0.01, 0.9), max_size=4), st.integers(1, 400))
def test_every_stage_has_its_share_of_the_steps_and_all_steps_the_same_tokens(shares: list[float], steps: int) -> None:
    scale = max(sum(shares) / 0.95, 1)
    stages = [{"share": share / scale, "sequence_length": 8 << n} for n, share in enumerate(shares)]
    config = TrainingConfig(tokens=steps * 128 * 2, sequence_length=128, batch_size=2, stages=stages)  # type: ignore[arg-type]
    counted = [length for counted, length in config.lengths for _ in counted]
    assert len(counted) == config.steps == steps
    assert [config.length_at(step) for step in range(steps)] == counted
    for (counted_steps, length), stage in zip(config.lengths, config.stages, strict=False):
        assert length == stage.sequence_length
        assert abs(len(counted_steps) - stage.share * steps) <= 1 + 1e-6


def test_masks_are_put_into_each_piece(blocks: TokenBlocks) -> None:
    objective = Infilling([61, 62], 63, 0, rate=2.0)
    loop = TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG, objective=objective)
    batch = loop._batch()[1]
    assert batch.tokens.shape == (8, 9)
    assert batch.counted is not None
    with_masks = [row for row in batch.tokens.tolist() if 61 in row]
    assert with_masks
    assert all(row.count(61) == 2 and 63 in row for row in with_masks)


def test_a_rise_of_the_loss_between_stages_is_no_spike() -> None:
    config = TrainingConfig(
        tokens=100 * 64, sequence_length=64, batch_size=1, spike_deviations=6, spike_window=16,
        stages=[{"share": 0.5, "sequence_length": 8}],  # type: ignore[list-item]
    )  # fmt: skip
    guards = Guards(config)
    losses = [2.0] * 50 + [3.0] * 30 + [9.0] * 5
    spikes = [step for step, loss in enumerate(losses, 1) if guards.watch(step, loss, skipped=False) is not None]
    assert spikes == [83, 84, 85]  # the median of five of the last rise, and not of the first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"share": 0.5, "sequence_length": 12}]}, r"32 tokens .* cannot be cut into blocks of 12"),
        ({"stages": [{"share": 0.5, "sequence_length": 64}]}, r"32 tokens .* cannot be cut into blocks of 64"),
        ({"stages": [{"share": 0.5, "sequence_length": 32}]}, r"cannot be cut into blocks of 32"),
        ({"stages": [{"share": 0.01, "sequence_length": 8}]}, r"the run has 12 steps, and the part with blocks of 8"),
        ({"stages": [{"share": 0.99, "sequence_length": 8}]}, r"the run has 12 steps, and the part with blocks of 32"),
    ],
)
def test_stages_that_do_not_fit_a_run_are_refused(changes: dict[str, Any], message: str) -> None:
    config = validate_settings(TrainingConfig, {**SETTINGS, **changes}, "training")
    with pytest.raises(UserError, match=message):
        require_phases(config)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"share": 0.5, "sequence_length": 8}] * 2, "the shares of stages sum to 1; leave a part"),
        ([{"share": 0.7, "sequence_length": 8}] * 2, "the shares of stages sum to 1.4"),
        ([{"share": 1.0, "sequence_length": 8}], "less than 1"),
        ([{"share": 0, "sequence_length": 8}], "greater than 0"),
        ([{"share": 0.5, "sequence_length": 4}], "greater than or equal to 8"),
        ([{"share": 0.5}], "sequence_length"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate_settings(TrainingConfig, {"stages": stages}, "training")


def test_without_stages_all_blocks_are_whole() -> None:
    config = TrainingConfig()
    require_phases(config)
    assert config.lengths == ((range(config.steps), config.sequence_length),)
    assert config.part_begins == frozenset()
