"""The training loop, against the plainest loop one could write and torch's own optimiser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from expertctl import UserError
from expertctl.core.config.settings import TrainingConfig
from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part
from expertctl.experts.runs.trainable import all_parameters, matching_parameters
from expertctl.experts.training.checkpointing import BackgroundCheckpoints, restore_latest, save_checkpoint
from expertctl.experts.training.steps.loop import TrainingLoop
from expertctl.experts.training.steps.schedule import learning_rate, progress_at

CONFIG = TrainingConfig(
    tokens=8 * 2 * 16,
    sequence_length=16,
    batch_size=2,
    learning_rate=1e-2,
    weight_decay=0.1,
    clip=0.5,
    device="cpu",
)


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=64,
            max_position_embeddings=64,
        )
    )


@pytest.fixture
def blocks(tmp_path: Path) -> TokenBlocks:
    folder = tmp_path / "part"
    folder.mkdir()
    ids = np.random.default_rng(0).integers(1, 64, size=(40, 30)).tolist()
    write_part(folder, [EncodedDocument("x" * 30, row) for row in ids], separator=0, vocabulary=64)
    return TokenBlocks(TokenStore(folder), CONFIG.sequence_length)


def run(loop: TrainingLoop, steps: int | None = None) -> list[float]:
    losses = []
    for report in loop.steps():
        losses.append(float(report.loss))
        if steps is not None and report.step == steps:
            break
    return losses


def test_the_loop_equals_a_hand_written_one_with_torch_adamw(blocks: TokenBlocks) -> None:
    loop = TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG)
    batches = []
    draw = loop._batch
    loop._batch = lambda: batches.append(draw()) or batches[-1]  # type: ignore[method-assign,func-returns-value]
    losses = run(loop)

    model = tiny_model().train()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=CONFIG.betas,
        eps=CONFIG.epsilon,
        fused=True,
    )
    for step, (_, drawn) in enumerate(batches):
        batch = drawn.tokens
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(CONFIG, progress_at(CONFIG, step))
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), batch[:, 1:].reshape(-1))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        assert losses[step] == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loop.parameters[name], parameter, atol=1e-6, rtol=0)


def test_accumulation_equals_one_larger_batch(blocks: TokenBlocks) -> None:
    whole = TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG)
    halves = CONFIG.model_copy(update={"batch_size": 1, "accumulation": 2})
    split = TrainingLoop(all_parameters(tiny_model()), blocks, halves)
    assert run(whole) == pytest.approx(run(split), abs=1e-5)


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_going_on_from_a_checkpoint_gives_the_same_bits(blocks: TokenBlocks, tmp_path: Path, stop: int) -> None:
    whole = TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG)
    losses = run(whole)

    first = TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG)
    begun = run(first, stop)
    save_checkpoint(first, tmp_path / "state")
    second = TrainingLoop(all_parameters(tiny_model(seed=9)), blocks, CONFIG)
    assert restore_latest(second, tmp_path / "state") == stop
    assert begun + run(second) == losses
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name
    for name, tensor in whole.optimiser_state().items():
        assert torch.equal(tensor, second.optimiser_state()[name]), name


def test_checkpoints_in_the_background_are_those_of_their_step(blocks: TokenBlocks, tmp_path: Path) -> None:
    whole = TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG)
    background, losses = BackgroundCheckpoints(), []
    for report in whole.steps():
        losses.append(float(report.loss))
        if report.step in (2, 4):
            background.save(whole, tmp_path / "state", {})
    background.wait()
    second = TrainingLoop(all_parameters(tiny_model(seed=9)), blocks, CONFIG)
    assert restore_latest(second, tmp_path / "state") == 4
    assert run(second) == losses[4:]


def test_a_checkpoint_that_cannot_be_written_in_the_background_is_reported(blocks: TokenBlocks, tmp_path: Path) -> None:
    loop = TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG)
    (tmp_path / "state").write_text("a file")
    background = BackgroundCheckpoints()
    background.save(loop, tmp_path / "state", {})
    with pytest.raises(UserError, match="state: File exists"):
        background.wait()


def test_random_numbers_go_on_too(blocks: TokenBlocks, tmp_path: Path) -> None:
    loop = TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG)
    save_checkpoint(loop, tmp_path / "state")
    expected = torch.rand(4)
    torch.manual_seed(123)
    restore_latest(loop, tmp_path / "state")
    assert torch.equal(torch.rand(4), expected)


def test_only_two_checkpoints_are_kept(blocks: TokenBlocks, tmp_path: Path) -> None:
    loop = TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG)
    for _ in loop.steps():
        save_checkpoint(loop, tmp_path / "state")
    assert [path.name for path in sorted((tmp_path / "state").iterdir())] == [
        "step-00000007",
        "step-00000008",
    ]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "state"])
def test_a_damaged_checkpoint_is_one_clear_error(blocks: TokenBlocks, tmp_path: Path, damage: str) -> None:
    loop = TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG)
    run(loop, 2)
    folder = save_checkpoint(loop, tmp_path / "state")
    weights = folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "truncate":
        weights.write_bytes(content[:-10])
    elif damage == "flip":
        content[-5] ^= 1
        weights.write_bytes(content)
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / "state.json").write_text('{"step": 2')
    with pytest.raises(UserError, match=r"checkpoint .*step-00000002 is damaged .*delete it to resume from the start"):
        restore_latest(loop, tmp_path / "state")


def test_only_the_chosen_part_moves_and_has_optimiser_state(blocks: TokenBlocks) -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loop = TrainingLoop(matching_parameters(model, ["*.mlp.down_proj.*"]), blocks, CONFIG)
    run(loop)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    assert {name.rpartition("/")[0] for name in loop.optimiser_state()} == moved


def test_text_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    write_part(tmp_path, [EncodedDocument("abc", [1, 2, 3])], separator=0, vocabulary=64)
    with pytest.raises(UserError, match="shorter than one block of 16 tokens"):
        TrainingLoop(all_parameters(tiny_model()), TokenBlocks(TokenStore(tmp_path), 16), CONFIG)


def test_an_unknown_device_is_refused(blocks: TokenBlocks) -> None:
    config = CONFIG.model_copy(update={"device": "gpu"})
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        TrainingLoop(all_parameters(tiny_model()), blocks, config)


def test_the_golden_losses_of_a_seeded_run(blocks: TokenBlocks) -> None:
    losses = run(TrainingLoop(all_parameters(tiny_model()), blocks, CONFIG))
    assert losses == pytest.approx(GOLDEN, abs=2e-4)


GOLDEN = [4.17283, 4.15589, 4.14259, 4.18691, 4.15741, 4.18667, 4.18516, 4.15925]
