"""Adapters extracted from full models: loading them with peft, and their approximation error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertctl.core.errors import UserError
from expertctl.core.testing import tiny_model_folder
from expertctl.merge.extraction import extract_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a model in which every tensor changed."""
    from transformers import AutoModelForCausalLM

    base = tiny_model_folder(tmp_path / "base", "llama", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "tuned")
    return base, tmp_path / "tuned"


def with_adapter(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    tensors: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return tensors


def state(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_full_rank_and_the_rest_give_the_model_back(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    report = extract_adapter(base, tuned, tmp_path / "lora", rank=10_000, save_rest=True)
    assert report.error < 1e-6
    assert report.left_out == ()
    merged = with_adapter(base, tmp_path / "lora")
    for name, tensor in state(tuned).items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{"rank": 4}, {"rank": None, "energy": 0.7}])
def test_the_reported_loss_is_what_peft_sees(models: tuple[Path, Path], tmp_path: Path, how: dict[str, Any]) -> None:
    base, tuned = models
    report = extract_adapter(base, tuned, tmp_path / "lora", **how)
    merged, before, after = with_adapter(base, tmp_path / "lora"), state(base), state(tuned)
    lost = whole = 0.0
    for tensor in report.tensors:
        delta = (after[tensor.name] - before[tensor.name]).double()
        missing = float((after[tensor.name].double() - merged[tensor.name].double()).norm())
        assert missing / float(delta.norm()) == pytest.approx(tensor.error, rel=1e-3)
        values = np.linalg.svd(delta.numpy(), compute_uv=False)
        assert tensor.error == pytest.approx(
            float(np.linalg.norm(values[tensor.rank :]) / np.linalg.norm(values)), rel=1e-6
        )
        lost, whole = lost + missing**2, whole + float(delta.norm()) ** 2
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert "model.norm.weight" in report.left_out
    if how["rank"] is None:
        assert len({tensor.rank for tensor in report.tensors}) > 1
        assert all(tensor.error**2 <= 0.3 + 1e-9 for tensor in report.tensors)


def test_targets_are_chosen_by_name(models: tuple[Path, Path], tmp_path: Path) -> None:
    report = extract_adapter(*models, tmp_path / "lora", rank=2, targets="mlp")
    assert report.tensors
    assert all(".mlp." in tensor.name for tensor in report.tensors)


def test_an_extracted_adapter_is_an_expert_of_a_merge(models: tuple[Path, Path], tmp_path: Path) -> None:
    from toy_models import engine_merge, recipe, tensors_of

    extract_adapter(*models, tmp_path / "lora", rank=10_000, save_rest=True)
    engine_merge(recipe("linear", {"seed": models[0], "lora": tmp_path / "lora"}, seed="seed"), tmp_path / "out")
    for name, tensor in tensors_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor, tensors_of(models[1])[name], rtol=1e-4, atol=1e-5)


def test_impossible_extractions_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    for how, part in (
        ({"rank": None}, "give either a rank or"),
        ({"rank": 4, "energy": 0.5}, "give either a rank or"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": None, "energy": 1.5}, "energy is 1.5"),
        ({"rank": 4, "targets": "nothing"}, "nothing to extract"),
    ):
        with pytest.raises(UserError, match=part):
            extract_adapter(base, tuned, tmp_path / "lora", **how)  # type: ignore[arg-type]  # mixed on purpose
    with pytest.raises(UserError, match="nothing to extract"):
        extract_adapter(base, base, tmp_path / "lora")
    other = tiny_model_folder(tmp_path / "other", "olmo2")
    with pytest.raises(UserError, match=r"tensor '.*' is in"):
        extract_adapter(base, other, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
