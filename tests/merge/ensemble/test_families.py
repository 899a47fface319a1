"""Generation with a cache gives the same tokens as without one, whatever the families keep between tokens."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expertctl import load_model
from expertctl.core.models.loading import load_network
from expertctl.merge.ensemble.model import EnsembleConfig, EnsembleForCausalLM
from expertctl.workspace import Workspace

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "gpt_oss": {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
    "lfm2": {"num_hidden_layers": 4, "full_attn_idxs": [1, 3], "layer_types": None},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "layers_block_type": ["mamba", "attention"],
        "mamba_expand": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1],
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "adapter_rank": 4,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "jamba": {
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {
        **LINEAR,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_5_text": LINEAR,
    "olmo_hybrid": {**LINEAR, "linear_num_value_heads": 2},
}
WITHOUT_A_CACHE: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "expand": 2, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 32},
}


def ensemble(family: str, settings: dict[str, Any]) -> EnsembleForCausalLM:
    config = AutoConfig.for_model(family, **(SIZES | settings))
    members = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        members.append(AutoModelForCausalLM.from_config(config).eval())
    mixer = {"prior": [0.5, 0.5], "prior_kind": "uniform"}
    member = config.to_dict() | {"model_type": family}
    stated = EnsembleConfig(member=member, experts=["a", "b"], mixer="posterior", mixer_settings=mixer)
    return EnsembleForCausalLM(stated, members)


def generated(model: EnsembleForCausalLM, *, use_cache: bool) -> torch.Tensor:
    prompt = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0  # padding on the left
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=mask, use_cache=use_cache, **settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("family", "settings"), FAMILIES.items())
def test_a_cache_changes_no_token(family: str, settings: dict[str, Any]) -> None:
    model = ensemble(family, settings)
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))


@pytest.mark.parametrize(("family", "settings"), WITHOUT_A_CACHE.items())
def test_families_without_keys_and_values_read_the_whole_text_and_say_so(family: str, settings: dict[str, Any]) -> None:
    model = ensemble(family, settings)
    with pytest.warns(UserWarning, match=f"models of type '{family}' keep no keys and values"):
        cached = generated(model, use_cache=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="models of type")
        assert torch.equal(cached, generated(model, use_cache=False))


def test_experts_whose_tensors_are_stacked_in_memory_are_loaded(tmp_path: Path, new_workspace: Any) -> None:
    root = new_workspace(tmp_path / "ws", ["a", "b"], family="mixtral", changed="*.experts.1.*")
    Workspace(root).merge("m", method="ensemble", options={"prior": "uniform"})
    loaded, _ = load_model(root / "generalists" / "m")
    loaded.save_pretrained(tmp_path / "again")
    for model in (loaded, load_network(tmp_path / "again")):
        for number, name in enumerate(("a", "b")):
            expert, _ = load_model(root / "experts" / name)
            member = dict(model.members[number].named_parameters())
            assert all(torch.equal(member[key], parameter) for key, parameter in expert.named_parameters())
