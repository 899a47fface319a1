"""Optimisers: their steps against torch's own, their memory, and going on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expertctl import UserError
from expertctl.core.config.settings import TrainingConfig
from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part
from expertctl.experts.runs.trainable import all_parameters
from expertctl.experts.training.checkpointing import restore_latest, save_checkpoint
from expertctl.experts.training.steps.loop import TrainingLoop, make_optimiser
from expertctl.plugins.basics.optimisers import decay_groups, optimisers

NAMES = sorted(offer.name for offer in optimisers())
CONFIG = TrainingConfig(
    tokens=2 * 16 * 12,
    sequence_length=16,
    batch_size=2,
    learning_rate=3e-3,
    warmup=0.0,
    schedule="constant",
    device="cpu",
)


def needs(name: str) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")


def model_of(width: int = 64) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=96,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture
def blocks(tmp_path: Path) -> TokenBlocks:
    folder = tmp_path / "part"
    folder.mkdir()
    ids = (np.random.default_rng(0).integers(4, 96, size=(60, 1)) + np.arange(20)) % 92 + 4
    write_part(folder, [EncodedDocument("x" * 7, row) for row in ids.tolist()], separator=0, vocabulary=96)
    return TokenBlocks(TokenStore(folder), CONFIG.sequence_length)


def loop_of(blocks: TokenBlocks, name: str, **settings: Any) -> TrainingLoop:
    config = CONFIG.model_copy(update={"optimiser": name, **settings})
    return TrainingLoop(all_parameters(model_of()), blocks, config)


def state_bytes(loop: TrainingLoop) -> int:
    return sum(value.numel() * value.element_size() for value in loop.optimiser_state().values() if value.dim())


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_lowers_the_loss_and_says_its_memory(name: str, blocks: TokenBlocks) -> None:
    needs(name)
    settings = {"tokens": 2 * 16 * 40, **({"learning_rate": 0.1, "clip": None} if name == "sgd" else {})}
    loop = loop_of(blocks, name, **settings)
    losses = [float(report.loss) for report in loop.steps()]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - (0.1 if name == "sgd" else 0.5)
    (offer,) = [offer for offer in optimisers() if offer.name == name]
    assert offer.state_bytes(loop.parameters) == pytest.approx(
        state_bytes(loop), rel=0.25 if name == "adamw_8bit" else 0.01
    )
    assert loop.notes == [f"state of {name}: {offer.state_bytes(loop.parameters) / 1e6:,.1f} MB"]


@pytest.mark.parametrize("name", NAMES)
def test_going_on_from_a_checkpoint_gives_the_same_bits(name: str, blocks: TokenBlocks, tmp_path: Path) -> None:
    needs(name)
    straight = loop_of(blocks, name)
    expected = [float(report.loss) for report in straight.steps()]
    first = loop_of(blocks, name)
    for report in first.steps():
        if report.step == 5:
            save_checkpoint(first, tmp_path / "state", {})
            break
    second = loop_of(blocks, name)
    assert restore_latest(second, tmp_path / "state", {}) == 5
    assert [float(report.loss) for report in second.steps()] == expected[5:]
    for parameter, other in zip(straight.parameters.values(), second.parameters.values(), strict=True):
        assert torch.equal(parameter, other)
    state, other_state = straight.optimiser_state(), second.optimiser_state()
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[key], other_state[key]) for key in state)


def test_muon_is_torchs_for_hidden_matrices_and_adamw_for_the_rest(blocks: TokenBlocks) -> None:
    loop = loop_of(blocks, "muon", optimiser_options={"momentum": 0.9})
    batches = []
    draw = loop._batch
    loop._batch = lambda: batches.append(draw()) or batches[-1]  # type: ignore[method-assign,func-returns-value]
    losses = [float(report.loss) for report in loop.steps()]

    model = model_of().train()
    hidden = [parameter for name, parameter in model.named_parameters() if ".layers." in name and parameter.dim() == 2]
    rest = {
        name: parameter for name, parameter in model.named_parameters() if ".layers." not in name or parameter.dim() < 2
    }
    both = [
        torch.optim.Muon(hidden, lr=3e-3, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(decay_groups(rest, 0.1), lr=3e-3, betas=CONFIG.betas, eps=CONFIG.epsilon),
    ]
    for step, (_, batch) in enumerate(batches):
        loss = torch.nn.functional.cross_entropy(
            model(batch.tokens[:, :-1]).logits.flatten(0, 1), batch.tokens[:, 1:].flatten()
        )
        assert losses[step] == pytest.approx(loss.item(), abs=1e-3)  # Newton-Schulz runs in bfloat16
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in both:
            optimiser.step()
            optimiser.zero_grad()


@pytest.mark.slow
def test_states_in_8_bits_have_the_losses_of_32_in_less_than_a_third_of_the_memory(blocks: TokenBlocks) -> None:
    needs("adamw_8bit")
    losses, sizes = {}, {}
    for name in ("adamw", "adamw_8bit"):
        loop = loop_of(blocks, name, tokens=2 * 16 * 300, learning_rate=1e-3)
        losses[name] = [float(report.loss) for report in loop.steps()]
        wide = dict(model_of(256).named_parameters())
        optimiser = make_optimiser(wide, CONFIG.model_copy(update={"optimiser": name}))
        for parameter in wide.values():
            parameter.grad = torch.ones_like(parameter)
        optimiser.step()
        states = [value for parameter in wide.values() for value in optimiser.state[parameter].values()]
        sizes[name] = sum(value.numel() * value.element_size() for value in states if torch.is_tensor(value))
    for begin in range(0, 300, 50):
        mean, other = (sum(losses[name][begin : begin + 50]) / 50 for name in ("adamw", "adamw_8bit"))
        assert other == pytest.approx(mean, rel=0.01)
    assert sizes["adamw_8bit"] <= 0.3 * sizes["adamw"]


def test_what_cannot_be_is_refused_before_training(blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no optimiser 'adam' \(did you mean 'adamw'\?\)"):
        loop_of(blocks, "adam")
    with pytest.raises(UserError, match=r"has no option 'momentun' \(did you mean 'momentum'"):
        loop_of(blocks, "sgd", optimiser_options={"momentun": 1})
    with pytest.raises(UserError, match="momentum is 2"):
        loop_of(blocks, "muon", optimiser_options={"momentum": 2})
    with pytest.raises(UserError, match="'muon' needs whole tensors"):
        make_optimiser({}, CONFIG.model_copy(update={"optimiser": "muon"}), is_sharded=True)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"adamw_8bit needs bitsandbytes .*pip install"):
        loop_of(blocks, "adamw_8bit")
