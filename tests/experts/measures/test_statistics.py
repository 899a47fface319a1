"""Gram matrices and Fisher information against naive sums, and merges by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertctl.core.errors import UserError
from expertctl.core.models.loading import load_model
from expertctl.core.testing import tiny_model_folder
from expertctl.experts.measures.statistics import gather_fisher, gather_grams
from expertctl.workspace import Workspace

BLOCKS = [np.random.default_rng(number).integers(3, 40, 9) for number in range(5)]
CONFIG = "training: {sequence_length: 16}\ndomains:\n  code: {path: text}\n"


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return load_model(tiny_model_folder(tmp_path / "m", "llama"), dtype="float32")[0]


def test_grams_are_the_mean_products_of_a_layers_inputs(model: Any) -> None:
    seen: list[torch.Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].double()))
    grams = gather_grams(model, BLOCKS)
    handle.remove()
    x = torch.cat(seen)
    expected = x.T @ x / len(x)
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(grams[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert all(gram.shape == (model.get_parameter(name).shape[1],) * 2 for name, gram in grams.items())
    assert not layer._forward_hooks


def test_fisher_information_is_the_mean_square_of_the_blocks_gradients(model: Any) -> None:
    fisher = gather_fisher(model, BLOCKS)
    name = "model.layers.0.self_attn.q_proj.weight"
    parameter = model.get_parameter(name)
    total = torch.zeros_like(parameter, dtype=torch.float64)
    for block in BLOCKS:
        model.zero_grad()
        tokens = torch.from_numpy(block)[None]
        scores = torch.log_softmax(model(tokens[:, :-1]).logits.double(), -1)[0]
        scores[range(len(block) - 1), tokens[0, 1:]].sum().backward()
        total += parameter.grad.double() ** 2
    torch.testing.assert_close(fisher[name].double(), total / len(BLOCKS), rtol=1e-4, atol=1e-9)
    assert set(fisher) == {name for name, _ in model.named_parameters()}


def test_no_text_is_an_error(model: Any) -> None:
    for gather in (gather_grams, gather_fisher):
        with pytest.raises(UserError, match="no text to compute statistics on"):
            gather(model, [])


@pytest.fixture
def ws(tmp_path: Path, new_workspace: Any) -> Workspace:
    folder = new_workspace(tmp_path / "ws", ("code", "law"), config=CONFIG)
    (folder / "text").mkdir()
    for number in range(30):
        words = " ".join(str((number * 7 + step) % 23) for step in range(60))
        (folder / "text" / f"{number}.txt").write_text(f"document {number}: {words}\n")
    return Workspace(folder)


@pytest.mark.parametrize(("method", "kind"), [("regmean", "gram"), ("fisher", "fisher")])
def test_a_merge_by_statistics(ws: Workspace, method: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"collect them with `expertctl stats code --kind {kind}`"):
        ws.merge("m", method=method)
    for name in ("code", "law"):
        written = ws.experts.statistics(name, kind=kind, domain="code", samples=4)
        assert written["blocks"] == 4
    merged = ws.merge("m", method=method)
    mean = ws.merge("mean", method="average")
    changed = {name for name in mean.tensors if merged.tensors[name] != mean.tensors[name]}
    assert "model.layers.0.mlp.up_proj.weight" in changed
    with pytest.raises(UserError, match="exists already"):
        ws.experts.statistics("law", kind=kind, domain="code", samples=4)
    load_model(ws.generalists / "m")


def test_statistics_of_another_training_are_refused(ws: Workspace) -> None:
    for name in ("code", "law"):
        ws.experts.statistics(name, domain="code", samples=2)
    path = ws.root / "statistics" / "law" / "gram" / "statistics.json"
    digest = (ws.experts / "law" / "expert.json").read_text().partition('"digest": "')[2][:64]
    path.write_text(path.read_text().replace(digest, "0" * 64))
    with pytest.raises(UserError, match="belong to an earlier version of expert 'law'"):
        ws.merge("m", method="regmean")


def test_a_domain_has_to_be_named_where_the_experts_is_not_in_the_project(ws: Workspace) -> None:
    with pytest.raises(UserError, match="choose one with --domain"):
        ws.experts.statistics("law")
    with pytest.raises(UserError, match="no kind of statistics 'grams'"):
        ws.experts.statistics("law", kind="grams", domain="code")
