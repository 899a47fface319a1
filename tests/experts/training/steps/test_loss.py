"""The loss in pieces, with documents apart and with less memory: the same as the plain loss, or a refusal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from expertctl import TrainablePart, UserError
from expertctl.core.config.settings import TrainingConfig
from expertctl.core.hooks.steps import Batch
from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part
from expertctl.experts.runs.trainable import all_parameters, matching_parameters
from expertctl.experts.training.checkpointing import restore_latest, save_checkpoint
from expertctl.experts.training.steps.loop import TrainingLoop
from expertctl.experts.training.steps.loss import document_positions

SEPARATOR = 3
CONFIG = TrainingConfig(tokens=4 * 2 * 16, sequence_length=16, batch_size=2, learning_rate=1e-2, device="cpu")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
}


def tiny(family: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | settings), dtype=torch.float32)


@pytest.fixture
def blocks(tmp_path: Path) -> TokenBlocks:
    folder = tmp_path / "part"
    folder.mkdir()
    ids = np.random.default_rng(0).integers(4, 96, size=(60, 7)).tolist()
    write_part(folder, [EncodedDocument("x" * 7, row) for row in ids], separator=SEPARATOR, vocabulary=96)
    return TokenBlocks(TokenStore(folder), CONFIG.sequence_length)


def trained(blocks: TokenBlocks, model: Any, part: Any = all_parameters, **settings: Any) -> tuple[list[float], Any]:
    loop = TrainingLoop(part(model), blocks, CONFIG.model_copy(update=settings), separator=SEPARATOR)
    return [float(report.loss) for report in loop.steps()], loop


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a piece have the logits of eight tokens."""
    monkeypatch.setattr("expertctl.experts.training.steps.loss.PIECE_BYTES", 8 * 4 * 96)
    monkeypatch.setattr("expertctl.experts.training.steps.loss.LEAST_ROWS", 1)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
        ("phi", {}),  # its output layer has a bias
        ("gpt_neox", {}),
    ],
)
def test_the_loss_in_pieces_is_the_whole_one(family: str, settings: dict[str, Any], blocks: TokenBlocks) -> None:
    whole, _ = trained(blocks, tiny(family, **settings), chunked_loss=False)
    pieces, _ = trained(blocks, tiny(family, **settings), chunked_loss=True)
    assert pieces == pytest.approx(whole, abs=1e-4)
    gradients = []
    for chunked in (False, True):
        part = all_parameters(tiny(family, **settings))
        loop = TrainingLoop(part, blocks, CONFIG.model_copy(update={"chunked_loss": chunked}))
        loop._loss(loop._batch()[1]).backward()
        gradients.append({name: parameter.grad for name, parameter in loop.parameters.items()})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("small_pieces")
def test_logits_are_never_whole_in_pieces(blocks: TokenBlocks) -> None:
    shapes: list[tuple[int, ...]] = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            shapes.extend(
                tuple(tensor.shape) for tensor in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(tensor)
            )
            return out

    for chunked, is_whole in ((False, True), (True, False)):
        shapes.clear()
        loop = TrainingLoop(all_parameters(tiny()), blocks, CONFIG.model_copy(update={"chunked_loss": chunked}))
        shapes.clear()
        with Watched():
            next(loop.steps())
        assert any(shape in ((2, 16, 96), (32, 96)) for shape in shapes) == is_whole


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0, "query_pre_attn_scalar": 8}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_models_that_change_their_logits_are_not_computed_in_pieces(
    family: str, settings: dict[str, Any], blocks: TokenBlocks
) -> None:
    with pytest.raises(UserError, match=r"training\.chunked_loss: this model changes the logits"):
        trained(blocks, tiny(family, **settings), chunked_loss=True)
    whole, _ = trained(blocks, tiny(family, **settings), chunked_loss=False)
    chosen, _ = trained(blocks, tiny(family, **settings))
    assert chosen == whole


def test_large_logits_are_computed_in_pieces_by_default(blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    for threshold, is_chunked in ((2 * 16 * 96 * 4, False), (2 * 16 * 96 * 4 - 1, True)):
        monkeypatch.setattr("expertctl.experts.training.steps.loop.WHOLE_LOGITS_BYTES", threshold)
        model = tiny()
        TrainingLoop(all_parameters(model), blocks, CONFIG)
        assert ("forward" in vars(model.lm_head)) == is_chunked


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3))
def test_positions_begin_anew_after_every_separator(rows: list[list[int]]) -> None:
    expected = []
    for row in rows:
        position, of_row = 0, []
        for token in row:
            of_row.append(position)
            position = 0 if token == SEPARATOR else position + 1
        expected.append(of_row)
    assert document_positions(torch.tensor(rows), SEPARATOR).tolist() == expected


def test_separate_documents_have_the_loss_of_each_alone(blocks: TokenBlocks) -> None:
    model = tiny()
    loop = TrainingLoop(
        all_parameters(model), blocks, CONFIG.model_copy(update={"separate_documents": True}), separator=SEPARATOR
    )
    row = torch.tensor([[9, 8, SEPARATOR, 20, 21, 22, SEPARATOR, 30, 31]])
    total = 0.0
    with torch.no_grad():
        for part in ([9, 8, SEPARATOR, 20], [20, 21, 22, SEPARATOR, 30], [30, 31]):
            tokens = torch.tensor([part])
            logits = model(tokens[:, :-1]).logits
            total += float(nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum"))
        assert float(loop._loss(Batch(row))) == pytest.approx(total / 8, abs=1e-5)
    both, _ = trained(blocks, tiny(), separate_documents=True, chunked_loss=True)
    apart, _ = trained(blocks, tiny(), separate_documents=True)
    together, _ = trained(blocks, tiny())
    assert both == pytest.approx(apart, abs=1e-4)
    assert apart[0] != pytest.approx(together[0], abs=1e-3)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("mamba", {"state_size": 4, "conv_kernel": 4, "expand": 2}), ("bloom", {"n_layer": 2, "n_head": 4})],
)
@pytest.mark.parametrize("separator", [0, 1, SEPARATOR, 95])
def test_models_that_read_across_documents_are_refused(
    family: str, settings: dict[str, Any], separator: int, blocks: TokenBlocks
) -> None:
    config = CONFIG.model_copy(update={"separate_documents": True})
    with pytest.raises(UserError, match="cannot keep the documents of a block apart"):
        TrainingLoop(all_parameters(tiny(family, **settings)), blocks, config, separator=separator)
    TrainingLoop(all_parameters(tiny()), blocks, config, separator=separator)


def test_activations_computed_again_change_nothing(blocks: TokenBlocks) -> None:
    kept, one = trained(blocks, tiny())
    model = tiny()
    again, two = trained(blocks, model, activation_checkpointing=True)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert again == kept
    for name, parameter in one.parameters.items():
        assert torch.equal(two.parameters[name], parameter), name


def test_activations_of_unknown_layers_are_refused(blocks: TokenBlocks) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(96, 8), nn.Linear(8, 96)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=self.head(self.embed(input_ids)))

    def part(module: nn.Module) -> TrainablePart:
        return TrainablePart(module, dict(module.named_parameters()))

    with pytest.raises(UserError, match="the layers of Own cannot be computed again"):
        trained(blocks, Own(), part, activation_checkpointing=True)
    with pytest.raises(UserError, match="or hides that layer"):
        trained(blocks, Own(), part, chunked_loss=True)


def test_pure_bfloat16_keeps_everything_but_buffers_in_bfloat16(blocks: TokenBlocks, tmp_path: Path) -> None:
    settings = {"precision": "pure_bfloat16"}
    whole, loop = trained(blocks, tiny(), **settings)
    assert {value.dtype for value in loop.weights().values()} == {torch.bfloat16}
    assert {value.dtype for name, value in loop.optimiser_state().items() if "exp_avg" in name} == {torch.bfloat16}
    assert {buffer.dtype for buffer in loop.module.buffers()} == {torch.float32}
    exact, _ = trained(blocks, tiny())
    assert whole == pytest.approx(exact, rel=0.05)

    first = TrainingLoop(all_parameters(tiny()), blocks, CONFIG.model_copy(update=settings))
    steps = first.steps()
    begun = [float(next(steps).loss) for _ in range(2)]
    save_checkpoint(first, tmp_path / "state")
    second = TrainingLoop(all_parameters(tiny()), blocks, CONFIG.model_copy(update=settings))
    restore_latest(second, tmp_path / "state")
    assert begun + [float(report.loss) for report in second.steps()] == whole


def test_frozen_matrices_stay_in_bfloat16_where_nothing_is_lost(
    blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounded() -> Any:
        model = tiny()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        model.lm_head.weight.data[0, 0] = 1 + 2**-20  # not a number of bfloat16
        return model

    def feed_forward(model: Any) -> TrainablePart:
        return matching_parameters(model, ["*.mlp.*"])

    model = rounded()
    small, _ = trained(blocks, model, feed_forward, precision="bfloat16")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["model.layers.0.self_attn.q_proj.weight"] == torch.bfloat16
    assert dtypes["lm_head.weight"] == dtypes["model.embed_tokens.weight"] == torch.float32
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == dtypes["model.norm.weight"] == torch.float32
    monkeypatch.setattr("expertctl.experts.training.steps.loop.store_weights", lambda *_: None)
    large, _ = trained(blocks, rounded(), feed_forward, precision="bfloat16")
    assert small == large
