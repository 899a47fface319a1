"""Relatedness of checkpoints, estimated from samples of their matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_models import Tensors, random_tensors, write_model

from expertctl.core.artefacts.safetensors_io import Checkpoint, TensorEntry
from expertctl.core.errors import UserError
from expertctl.merge.sources.relatedness import RELATED, relatedness, require_related


def entries(folder: Path, tensors: Tensors) -> dict[str, TensorEntry]:
    return Checkpoint.of_folder(write_model(folder, tensors)).entries


def big(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    return random_tensors(seed, width=32, rows=64, layers=3, dtype=dtype)


def test_strangers_are_near_zero_and_relatives_near_one(tmp_path: Path) -> None:
    base = entries(tmp_path / "a", big(0))
    assert abs(relatedness(base, entries(tmp_path / "b", big(1))) or 1) < 0.1
    tuned = {name: tensor + 0.5 * torch.randn(tensor.shape) for name, tensor in big(0).items()}
    assert relatedness(base, entries(tmp_path / "c", tuned)) > 0.7


def test_another_dtype_is_no_difference(tmp_path: Path) -> None:
    base = entries(tmp_path / "a", big(0))
    assert relatedness(base, entries(tmp_path / "b", big(0, torch.bfloat16))) > 0.99


def test_two_trainings_of_one_seed_stay_relatives_and_another_seeds_does_not(tmp_path: Path) -> None:
    """A hundred steps at a learning rate that is far too high; the same text for all."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def trained(seed: int, order: int) -> Tensors:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=False, **sizes))
        text = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(order))
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(100):
            optimiser.zero_grad()
            model(input_ids=text, labels=text).loss.backward()
            optimiser.step()
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    first, second, other = (entries(tmp_path / str(n), trained(*how)) for n, how in enumerate(((0, 1), (0, 2), (5, 1))))
    assert relatedness(first, second) > RELATED + 0.05
    assert relatedness(first, other) < RELATED - 0.05


def test_constant_and_missing_tensors_say_nothing(tmp_path: Path) -> None:
    zeros = entries(tmp_path / "a", {name: torch.zeros_like(tensor) for name, tensor in big(0).items()})
    assert relatedness(zeros, zeros) is None
    require_related(("a", zeros), {"b": zeros})


def test_a_stranger_is_named_with_the_way_to_insist(tmp_path: Path) -> None:
    base, stranger = entries(tmp_path / "a", big(0)), entries(tmp_path / "b", big(1))
    with pytest.raises(UserError, match=r"'law' and 'seed' appear unrelated.*--allow-unrelated"):
        require_related(("seed", base), {"law": stranger})
