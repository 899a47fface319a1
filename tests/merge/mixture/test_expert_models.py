"""The model of one expert of a mixture is the expert itself where the mixture's other tensors are the seed's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expertctl import UserError, load_model
from expertctl.core.models.architectures import architecture_of
from expertctl.merge.mixture.expert_models import ExpertModels
from expertctl.merge.mixture.opened import OpenedMixture, open_mixture
from expertctl.workspace import Workspace

TOKENS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS, use_cache=False).logits


def opened_mixture(root: Path, make: Any, family: str, *, tied: bool = False, dtype: str = "float32") -> OpenedMixture:
    (pattern,) = architecture_of(family, ()).feed_forward
    workspace = Workspace(make(root, ("a", "b"), family=family, tied=tied, changed=pattern, dtype=dtype))
    workspace.merge("both", method="mixture", options={"router": "uniform"})
    return open_mixture(workspace.generalists / "both")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["olmo2", "llama", "qwen2", "qwen3", "gemma2", "gpt2"])
def test_the_model_of_an_expert_is_the_expert(tmp_path: Path, new_workspace: Any, family: str, tied: bool) -> None:
    mixture = opened_mixture(tmp_path / "w", new_workspace, family, tied=tied)
    models = ExpertModels(mixture.record.dense, mixture.shared, mixture.experts)
    for name in ("b", "a", "b"):
        expert, _ = load_model(tmp_path / "w" / "experts" / name, dtype="float32")
        torch.testing.assert_close(logits(models(name)), logits(expert), rtol=1e-5, atol=1e-5)


def test_it_is_in_float32_whatever_the_files_hold(tmp_path: Path, new_workspace: Any) -> None:
    mixture = opened_mixture(tmp_path / "w", new_workspace, "llama", dtype="bfloat16")
    model = ExpertModels(mixture.record.dense, mixture.shared, mixture.experts)("a")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expert, _ = load_model(tmp_path / "w" / "experts" / "a", dtype="float32")
    torch.testing.assert_close(logits(model), logits(expert), rtol=1e-5, atol=1e-5)


def test_a_family_with_other_tensor_names_is_refused(tmp_path: Path, new_workspace: Any) -> None:
    mixture = opened_mixture(tmp_path / "w", new_workspace, "olmo2")
    shared = {name: plan for name, plan in mixture.shared.items() if name != "model.norm.weight"}
    with pytest.raises(UserError, match=r"family 'olmo2' cannot be run one by one.* no tensor 'model.norm.weight'"):
        ExpertModels(mixture.record.dense, shared, mixture.experts)("a")
