"""Shared and perturbed experts of a workspace's mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expertctl import UserError, load_model
from expertctl.core.artefacts.files import read_json
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.verification import verify
from expertctl.merge.mixture.absence import find_expert
from expertctl.merge.remaking.reproducing import reproduce
from expertctl.workspace import Workspace


@pytest.fixture
def ws(tmp_path: Path, new_workspace: Any) -> Workspace:
    return Workspace(new_workspace(tmp_path / "ws", family="llama", changed="model.layers.*.mlp.*"))


def merge(ws: Workspace, **options: Any) -> Path:
    ws.merge("m", method="mixture", options={"router": "random", **options})
    return ws.layout.root / "generalists" / "m"


def test_an_expert_may_be_the_shared_one(ws: Workspace) -> None:
    folder = merge(ws, shared_expert={"news": True}, noise_scale={"law": 0.01}, residual_scale={"news": 0.5})
    assert verify(folder) == []
    model, _ = load_model(folder)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    with torch.inference_mode():
        assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()
    manifest = read_json(folder / "generalist.json")
    assert manifest["config"]["experts"] == ["code", "law"]
    assert manifest["config"]["mixture"]["shared_expert"] == "news"
    found = find_expert(folder, ws.layout.root / "experts" / "news")
    assert found.merged is not None
    assert found.found


def test_a_merge_with_noise_is_reproduced(ws: Workspace) -> None:
    folder = merge(ws, noise_scale={"law": 0.01})
    assert reproduce(read_manifest(folder), folder, layout=ws.layout).same


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"shared_expert": {"law": "yes"}}, "shared_expert of 'law' is 'yes'; it must be true or false"),
        ({"shared_expert": {"law": True, "code": True}}, "code, law are all shared experts; a mixture has at most one"),
        ({"noise_scale": {"law": -1}}, "noise_scale of 'law' is -1.0; it must be 0 or more"),
        ({"residual_scale": {"law": "x"}}, "residual_scale of 'law' is 'x', which is not a number"),
    ],
)
def test_wrong_settings_are_refused(ws: Workspace, options: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        merge(ws, **options)
    assert not (ws.layout.root / "generalists" / "m").exists()


def test_a_mixture_of_a_shared_expert_alone_is_refused(ws: Workspace) -> None:
    with pytest.raises(UserError, match="a mixture needs an expert beside the shared one"):
        ws.merge("m", method="mixture", experts=["law"], options={"router": "random", "shared_expert": {"law": True}})
