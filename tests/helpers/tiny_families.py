"""The smallest model of every family of causal language models in transformers that runs on a CPU.

`FAMILIES` has the settings in which a family differs from `SIZES`, and `EXCLUDED` the model types of
`AutoModelForCausalLM` that are not decoders of text, with the reason.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
}
MIXTURE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
"""Multi-head latent attention."""
INDEXED = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
SLIDING = {"sliding_window": 4}
INKLING = {
    **MIXTURE,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "unpadded_vocab_size": VOCABULARY,
    "sliding_window_size": 4,
    "rel_extent": 16,
    "d_rel": 4,
}
PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": MIXTURE,
    "apertus": {},
    "arcee": {},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**MIXTURE, **LATENT},
    "axk2": {**MIXTURE, **LATENT},
    "bailing_hybrid": {**MIXTURE, **LATENT, "layer_types": ["linear_attention", "full_attention"]},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "beam": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4, "n_ctx": 128},
    "cohere": {},
    "cohere2": SLIDING,
    "cohere2_moe": {**MIXTURE, **SLIDING},
    "cohere_compass_text": {
        **SLIDING,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "ctrl": {"dff": 48},
    "cwm": {},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**MIXTURE, **LATENT},
    "deepseek_v3": {**MIXTURE, **LATENT},
    "deepseek_v32": {**MIXTURE, **LATENT, **INDEXED},
    "deepseek_v4": {**MIXTURE, **LATENT, **INDEXED, "o_groups": 2, "o_lora_rank": 8},
    "diffllama": {},
    "doge": {},
    "dots1": MIXTURE,
    "dots3_note_text": {**MIXTURE, **LATENT, **INDEXED, "shared_experts_intermediate_size": 16},
    "ernie4_5": {},
    "ernie4_5_moe": {**MIXTURE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone4": {},
    "exaone_moe": MIXTURE,
    "falcon": {"head_dim": None},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    "falcon_mamba": {"state_size": 8},
    "flex_olmo": MIXTURE,
    "flint": {},
    "gemma": {},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gemma3n_text": {
        **SLIDING,
        **PER_LAYER_INPUTS,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    "gemma4_text": {**PER_LAYER_INPUTS, "num_kv_shared_layers": 0, "global_head_dim": 8},
    "glm": {},
    "glm4": {},
    "glm4_moe": MIXTURE,
    "glm4_moe_lite": {**MIXTURE, **LATENT},
    "glm_moe_dsa": {**MIXTURE, **LATENT, **INDEXED},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": {**MIXTURE, **SLIDING},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granite_swa": SLIDING,
    "granitemoe": MIXTURE,
    "granitemoe_swa": {**MIXTURE, **SLIDING},
    "granitemoehybrid": {
        **MAMBA,
        **MIXTURE,
        "layer_types": ["mamba", "attention"],
        "layers_block_type": ["mamba", "attention"],
        "mamba_expand": 2,
        "shared_intermediate_size": 16,
    },
    "granitemoeshared": {**MIXTURE, "shared_intermediate_size": 16},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": MIXTURE,
    "hy_v3": MIXTURE,
    "hy_v4": {**MIXTURE, **LATENT},
    "hyperclovax": {},
    "inkling2_text": INKLING,
    "inkling_text": INKLING,
    "jais2": {},
    "jamba": {
        **MIXTURE,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "jetmoe": {**MIXTURE, "kv_channels": 8},
    "kimi_linear": {
        **MIXTURE,
        **LATENT,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "kolibri1": MIXTURE,
    "laguna": MIXTURE,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {**MIXTURE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": {**MIXTURE, "intermediate_size_mlp": 48, "attention_chunk_size": 64},
    "longcat_flash": {
        **MIXTURE,
        **LATENT,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
        "zero_expert_num": 1,
        "num_layers": 2,
    },
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "expand": 2, "chunk_size": 8},
    "mellum": MIXTURE,
    "mimo_v2_flash": MIXTURE,
    "minicpm3": LATENT,
    "minimax": MIXTURE,
    "minimax_m2": MIXTURE,
    "minimax_m3_vl_text": MIXTURE,
    "ministral": SLIDING,
    "ministral3": SLIDING,
    "mistral": SLIDING,
    "mixtral": MIXTURE,
    "modernbert-decoder": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        **MIXTURE,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmo_hybrid": {**LINEAR, "linear_num_value_heads": 2},
    "olmoe": MIXTURE,
    "openai-gpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": MIXTURE,
    "qwen2": {},
    "qwen2_moe": MIXTURE,
    "qwen3": {},
    "qwen3_5_moe_text": {**LINEAR, **MIXTURE},
    "qwen3_5_text": LINEAR,
    "qwen3_moe": MIXTURE,
    "qwen3_next": {**LINEAR, **MIXTURE},
    "qwen4_exp_text": {
        **LINEAR,
        **MIXTURE,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": MIXTURE,
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": SLIDING,
    "xglm": {"ffn_dim": 48, "attention_heads": 4, "d_model": 32, "num_layers": 2},
    "xlstm": {
        "hidden_size": 64,
        "embedding_dim": 64,
        "num_heads": 4,
        "num_blocks": 2,
        "qk_dim_factor": 1.0,
        "head_dim": None,
    },
    "youtu": {**LATENT, "pad_token_id": None},  # transformers resets the row of the padding token at loading
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "head_dim": None,
        "tie_word_embeddings": True,
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
        "tie_word_embeddings": True,
    },
    "zaya": {**MIXTURE, "router_hidden_size": 16, "num_experts_per_tok": 1},
}

_ENCODER = "encoder of text"
_HALF = "decoder of an encoder-decoder model"
_MULTIMODAL = "reads images or sound"
_ALIAS = "class and layout of another family"
EXCLUDED: dict[str, str] = {
    **dict.fromkeys(
        [
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xlnet",
            "xmod",
        ],
        _ENCODER,
    ),
    **dict.fromkeys(
        [
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "musicgen",
            "musicgen_melody",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
            "trocr",
            "whisper",
        ],
        _HALF,
    ),
    **dict.fromkeys(
        [
            "dots3_note",
            "emu3",
            "fuyu",
            "gemma3",
            "gemma3n",
            "gemma4",
            "gemma4_unified",
            "gemma4_unified_text",
            "git",
            "got_ocr2",
            "llama4",
            "mllama",
            "moshi",
            "moss_transcribe_diarize",
            "phi4_multimodal",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen4_exp",
        ],
        _MULTIMODAL,
    ),
    **dict.fromkeys(("gpt-sw3", "internlm3", "iquestcoder"), _ALIAS),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts tokens for another model"),
    "blt": "reads bytes through a model of its own",
    "cpmant": "reads prompts of trained tokens beside the text",
    "reformer": "reads texts of one length only",
}


def family_config(family: str) -> Any:
    """Return the tiny configuration of a family."""
    from transformers import AutoConfig

    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    given = {key: value for key, value in {**SIZES, **tokens, **FAMILIES[family]}.items() if value is not None}
    return AutoConfig.for_model(family, **given)


def family_model(family: str, seed: int = 0) -> Any:
    """Return a random tiny model of a family in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(family_config(family), dtype=torch.float32).eval()


def family_folder(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a random tiny model of a family with a tokenizer, as a Hugging Face folder."""
    family_model(family, seed).save_pretrained(folder)
    for file in _tokenizer().iterdir():
        shutil.copy(file, folder / file.name)
    return folder


@cache
def _tokenizer() -> Path:
    """Return a folder with the tokenizer that all families share."""
    from expertctl.core.testing import tiny_model_folder

    folder = tiny_model_folder(Path(mkdtemp(prefix="expertctl-tokenizer-")), "llama")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert vocabulary <= VOCABULARY, vocabulary
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    return folder
