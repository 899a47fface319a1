"""Models in few bits, against the same models in full precision."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expertctl import UserError, load_model
from expertctl.core.models.kernels.quantised_linear import quantise
from expertctl.workspace import Workspace

pytest.importorskip("bitsandbytes")


NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
"""Values of the code, from QLoRA, appendix E."""


def model_of(family: str = "llama", width: int = 128) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=320,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.08,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def linear_bytes(model: Any) -> int:
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
    )


def naive(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return a layer's output with its rows and the inputs' rows rounded to 255 steps of their largest number, in float64."""
    weight, x = layer.weight.double(), x.double()
    is_outlier = (x.abs() > 6.0).any(dim=0)
    kept, scales = x.masked_fill(is_outlier, 0.0), weight.abs().amax(dim=1, keepdim=True) / 127
    coded = (weight / scales).round() * scales
    steps = kept.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    result = ((kept / steps).round() * steps) @ coded.T
    return result + x[:, is_outlier] @ coded[:, is_outlier].T


@pytest.mark.parametrize("outlier", [False, True])
def test_a_layer_is_the_naive_one(outlier: bool) -> None:
    model = model_of()
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(1))
    if outlier:
        x[:, 5] *= 20
    expected = naive(layer, x).detach()
    quantise(model, "int8")
    small = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        error = (small(x).double() - expected).abs().max()
    assert float(error) < 0.01 * float(expected.abs().max())
    assert small.weight.dtype == torch.int8


@pytest.mark.parametrize(("how", "part", "furthest"), [("int8", 4, 1e-3), ("nf4", 8, 0.1)])
def test_predictions_stay_close_in_a_part_of_the_memory(how: str, part: int, furthest: float) -> None:
    model = model_of()
    tokens = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(2))
    before = linear_bytes(model)
    with torch.no_grad():
        whole = model(tokens).logits.log_softmax(-1)
        assert quantise(model, how) == 2 * 7
        small = model(tokens).logits.log_softmax(-1)
    assert linear_bytes(model) == before // part
    assert model(tokens).logits.log_softmax(-1).allclose(small, atol=1e-6)  # with gradients, as without
    divergence = torch.nn.functional.kl_div(small, whole, reduction="batchmean", log_target=True) / tokens.shape[1]
    assert 0 < float(divergence) < furthest
    assert type(model.lm_head) is torch.nn.Linear


def test_a_layer_in_4_bits_has_the_16_values_of_the_paper() -> None:
    from bitsandbytes.functional import dequantize_4bit

    model = model_of()
    blocks = model.model.layers[0].mlp.up_proj.weight.detach().double().reshape(-1, 64)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(NF4, dtype=torch.float64)
    nearest = values[(blocks / scales).unsqueeze(-1).sub(values).abs().argmin(dim=-1)]
    quantise(model, "nf4")
    layer = model.model.layers[0].mlp.up_proj
    rounded = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    coded = rounded.double().reshape(-1, 64)
    coded_scales = coded.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(coded_scales, scales, atol=0, rtol=0.02)  # of 8 bits
    torch.testing.assert_close(coded / coded_scales, nearest, atol=1e-5, rtol=0)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ rounded.T, atol=1e-5, rtol=1e-5)


def test_rows_that_are_no_whole_blocks_are_rounded_too() -> None:
    model = model_of(width=88)
    x = torch.randn(9, 88, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model.model.layers[0].mlp.up_proj(x)
        quantise(model, "nf4")
        small = model.model.layers[0].mlp.up_proj(x)
    assert 0 < float((small - whole).norm() / whole.norm()) < 0.15


def test_a_workspace_evaluates_and_generates_in_8_bits(project: Workspace) -> None:
    seed = str(project.layout.seed)
    scores = [
        project.evaluate("seed", domains=["prose"], quantise=how).scores["seed"]["prose"].values["bits_per_byte"]
        for how in (None, "int8")
    ]
    assert scores[0] != scores[1]
    assert scores[1] == pytest.approx(scores[0], rel=0.01)
    texts = project.generate("seed", "def", quantise="int8")
    assert len(texts.continuation) > 0
    model, _ = load_model(seed, quantise="int8")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8


def test_an_ensembles_members_are_in_8_bits(shared_workspace: Path) -> None:
    workspace = Workspace(shared_workspace)
    if not (workspace.layout.generalists / "in-8-bits").exists():
        workspace.merge("in-8-bits", method="ensemble", options={"prior": "uniform"})
    model, _ = load_model(workspace.layout.generalists / "in-8-bits", quantise="int8")
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("up_proj")}
    assert kinds == {"Linear8bitLt"}


def test_what_cannot_be_is_refused(project: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = project.layout.seed
    with pytest.raises(UserError, match="int4"):
        load_model(seed, quantise="int4")
    with pytest.raises(UserError, match="either device_map or quantise"):
        load_model(seed, quantise="int8", device_map="auto")
    with pytest.raises(UserError, match="either nproc or quantise"):
        project.evaluate("seed", domains=["prose"], nproc=2, quantise="int8")
    with pytest.raises(UserError, match="no linear layer"):
        quantise(torch.nn.Embedding(3, 3), "int8")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="few bits need bitsandbytes"):
        load_model(seed, quantise="int8")
