"""The test kit: it makes what it promises, and it catches what it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertctl import MergeMethod, hookimpl
from expertctl.core.hooks.merging import TensorGroup
from expertctl.core.testing import assert_merge_ok, fresh_plugins, tensor_group, tiny_model_folder


@pytest.mark.parametrize("family", ["olmo2", "llama", "mistral", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_tiny_model_is_a_model_that_transformers_loads(tmp_path: Path, family: str, tied: bool) -> None:
    folder = tiny_model_folder(tmp_path / "m", family, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == family
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    assert model.num_parameters() < 30_000
    assert len(tokenizer) == model.config.vocab_size
    tokens = tokenizer("The lazy dog decides.", return_tensors="pt")
    assert tokenizer.decode(tokens["input_ids"][0]) == "The lazy dog decides."
    assert model.generate(**tokens, max_new_tokens=3).shape[0] == 1


def test_a_tiny_model_is_the_same_for_the_same_seed_only(tmp_path: Path) -> None:
    def weights(name: str, **settings: Any) -> bytes:
        return (tiny_model_folder(tmp_path / name, **settings) / "model.safetensors").read_bytes()

    assert weights("a", seed=1) == weights("b", seed=1)
    assert weights("a", seed=1) != weights("c", seed=2)


def test_making_a_tiny_model_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    tiny_model_folder(tmp_path / "m")
    assert torch.equal(torch.rand(1), expected)


def test_a_tiny_model_may_be_in_bfloat16(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def mean(group: TensorGroup) -> torch.Tensor:
    return torch.stack(group.experts).float().mean(dim=0).to(group.seed.dtype)


def in_place(group: TensorGroup, options: Any) -> torch.Tensor:
    group.seed.zero_()
    return mean(group)


def test_a_good_merge_passes() -> None:
    assert_merge_ok(lambda group, options: mean(group))


BAD: dict[str, Callable[[TensorGroup, Any], Any]] = {
    "returns list instead of a tensor": lambda group, options: [group.seed],
    "returns shape": lambda group, options: mean(group).reshape(-1),
    "returns torch.float32 for float64": lambda group, options: mean(group).float(),
    "non-finite": lambda group, options: mean(group) / 0,
    "modifies its input tensors": in_place,
    "different result the second time": lambda group, options: mean(group) + torch.rand(()).to(group.seed.dtype),
    "copies of the seed does not return the seed": lambda group, options: mean(group) * 2,
    "depends on the order": lambda group, options: group.experts[0],
}


@pytest.mark.parametrize("said", BAD)
def test_a_bad_merge_is_caught_and_told_apart(said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        assert_merge_ok(BAD[said])


def test_a_group_is_reproducible_and_uniform_unless_told_otherwise() -> None:
    first, second = tensor_group((2, 3)), tensor_group((2, 3))
    assert torch.equal(first.seed, second.seed)
    assert first.weights == (1 / 3,) * 3
    assert tensor_group((2,), num_experts=2, weights=(0.9, 0.1)).weights == (0.9, 0.1)


def test_fresh_plugins_keep_their_problems_to_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        @hookimpl
        def merge_method(self) -> list[MergeMethod]:
            return []

    manager = fresh_plugins(Broken())
    assert [problem.plugin for problem in manager.problems] == ["Broken"]
    assert fresh_plugins().problems == []
    assert fresh_plugins(builtins=False).offers(MergeMethod) == {}
    assert capsys.readouterr() == ("", "")
