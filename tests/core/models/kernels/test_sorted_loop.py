"""Experts one after the other give what transformers' own ways give, forward and backward."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from expertctl.core.models.kernels.sorted_loop import NAME, combine_experts, use_sorted_loop
from expertctl.core.models.loading import register_auto_classes

SIZE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}


def mixture(family: str, **settings: Any) -> PreTrainedModel:
    key = "num_local_experts" if family == "mixtral" else "num_experts"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZE, **settings, **{key: 4}))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def outcome_without_gradients(model: PreTrainedModel) -> torch.Tensor:
    tokens = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    return model(input_ids=tokens).logits


def outcome(model: PreTrainedModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
    tokens = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    return output.logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "olmoe"])
def test_logits_and_gradients_are_those_of_the_eager_experts(
    family: str, normalized: bool, trained: bool, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = mixture(family, norm_topk_prob=normalized)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained or ".experts." not in name)
    model.set_experts_implementation("eager")
    logits, gradients = outcome(model)
    use_sorted_loop(model)
    assert model.config._experts_implementation == NAME
    ours, our_gradients = outcome(model)
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(outcome_without_gradients(model), logits, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_the_choice_is_not_written_with_the_model(tmp_path: Path) -> None:
    model = mixture("mixtral")
    use_sorted_loop(model)
    model.save_pretrained(tmp_path)
    assert "expertctl" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_weights_keep_their_values_and_are_saved_as_before(
    capability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = mixture("mixtral")
    model.save_pretrained(tmp_path / "before")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_sorted_loop(model)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.mT.is_contiguous() == (capability == "AVX2")
    assert experts.down_proj.is_contiguous()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "after")
    saved = [(tmp_path / when / "model.safetensors").read_bytes() for when in ("before", "after")]
    assert saved[0] == saved[1]


def test_experts_of_another_layout_go_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = mixture("mixtral")
    use_sorted_loop(model)
    taken = []
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping,
        "grouped_mm",
        lambda module, hidden, *_: taken.append(module) or torch.zeros_like(hidden),
    )
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = True
    outcome(model)
    assert len(taken) == SIZE["num_hidden_layers"]


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
def test_families_whose_experts_are_others_run_as_transformers_has_them(family: str) -> None:
    heads = {"head_dim": 4, "mamba_num_heads": 4, "mamba_head_dim": 4, "n_groups": 1, "ssm_state_size": 4}
    blocks = {"layers_block_type": ["moe", "attention"]} if family == "nemotron_h" else {}
    experts = {"num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 8, "topk_group": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**SIZE, **heads, **experts, **blocks, "num_experts_per_tok": 2})
    ).eval()
    expected = outcome_without_gradients(model)
    way = model.config._experts_implementation
    use_sorted_loop(model)
    assert model.config._experts_implementation == way
    torch.testing.assert_close(outcome_without_gradients(model), expected)


def test_a_mixture_pickled_whole_runs_where_classes_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = mixture("mixtral")
    use_sorted_loop(model)
    expected = outcome_without_gradients(model)
    pickled = pickle.dumps(model)
    monkeypatch.delitem(ALL_EXPERTS_FUNCTIONS._global_mapping, NAME)  # as in another process
    register_auto_classes()
    torch.testing.assert_close(outcome_without_gradients(pickle.loads(pickled)), expected)


def test_a_dense_model_is_left_alone() -> None:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    before = model.config._experts_implementation
    use_sorted_loop(model)
    assert model.config._experts_implementation == before


def test_experts_that_get_no_token_are_not_run() -> None:
    def never(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    hidden = torch.arange(6.0).reshape(3, 2)
    gates, chosen = torch.full((3, 1), 2.0), torch.full((3, 1), 1)
    assert combine_experts([never, lambda rows: rows + 1, never], hidden, gates, chosen).equal((hidden + 1) * 2)


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_token_at_all(top_k: int) -> None:
    hidden = torch.zeros(0, 2, requires_grad=True)
    nothing = torch.zeros(0, top_k)
    combined = combine_experts([lambda rows: rows], hidden, nothing, nothing.long())
    combined.sum().backward()
    assert combined.shape == hidden.grad.shape == (0, 2)


def test_mixed_precision_trains_as_transformers_trains_it() -> None:
    model = mixture("mixtral")
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = outcome(model)
        use_sorted_loop(model)
        ours, our_gradients = outcome(model)
    torch.testing.assert_close(ours, logits)
    for mine, theirs in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("family", ["mixtral", "flex_olmo"])
def test_second_derivatives_are_those_of_the_eager_experts(family: str) -> None:
    model = mixture(family, attn_implementation="eager").double()
    tokens = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())

    def curvature() -> list[torch.Tensor]:
        loss = model(input_ids=tokens, labels=tokens).loss
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        return list(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), parameters))

    model.set_experts_implementation("eager")
    expected = curvature()
    use_sorted_loop(model)
    for ours, theirs in zip(curvature(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
