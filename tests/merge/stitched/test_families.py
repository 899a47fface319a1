"""Families are stitched and run, or refused when they are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expertctl import UserError, load_model
from expertctl.workspace import Workspace

pytestmark = pytest.mark.slow

RUNS = ("llama", "gpt2", "bloom", "mamba", "opt", "llama4_text", "rwkv", "qwen3_moe")
LONG = [pytest.param("falcon_h1", marks=pytest.mark.long)]
REFUSED = {"hrm_text": "no list of 16 decoder layers"}


@pytest.mark.parametrize("family", [*RUNS, *LONG])
@pytest.mark.filterwarnings("ignore:models of type '(mamba|rwkv)'")
def test_a_stitched_model_runs_and_its_cache_changes_no_token(family: str, tmp_path: Path, new_workspace: Any) -> None:
    root = new_workspace(tmp_path / "ws", ["a", "b"], family=family)
    Workspace(root).merge("m", method="stitch")
    model, _ = load_model(root / "generalists" / "m")
    prompt = torch.arange(10)[None]
    assert model(prompt).logits.isfinite().all()
    cached, anew = (
        model.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, anew)


@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_a_family_that_cannot_run_layer_by_layer_is_refused(
    family: str, reason: str, tmp_path: Path, new_workspace: Any
) -> None:
    root = new_workspace(tmp_path / "ws", ["a", "b"], family=family)
    with pytest.raises(UserError, match=f"{reason}.*models of this family cannot be stitched"):
        Workspace(root).merge("m", method="stitch")
    assert not (root / "generalists" / "m").exists()


def test_experts_whose_tensors_are_stacked_in_memory_keep_their_own(tmp_path: Path, new_workspace: Any) -> None:
    root = new_workspace(tmp_path / "ws", ["a"], family="mixtral", changed="*.experts.1.*")
    Workspace(root).merge("m", method="stitch")
    stitched, _ = load_model(root / "generalists" / "m")
    expert, _ = load_model(root / "experts" / "a")
    loaded = dict(stitched.experts[0].named_parameters())
    for name, parameter in expert.named_parameters():
        assert torch.equal(loaded[name], parameter), name
