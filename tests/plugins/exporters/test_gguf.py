"""GGUF files, read back by gguf's reader and loaded by transformers' own reader of GGUF."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from expertctl import UserError
from expertctl.core.artefacts.files import read_json, write_json
from expertctl.core.testing import tiny_model_folder
from expertctl.merge.generalists.exporting import export_model
from expertctl.plugins.exporters.gguf import file as gguf_file
from expertctl.plugins.exporters.gguf.metadata import rope_factors
from expertctl.plugins.exporters.gguf.vocabulary import read_vocabulary
from expertctl.workspace import Workspace

gguf = pytest.importorskip("gguf")

TOKENS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
NORMALIZED = {"qwen3_moe": True}
LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}
"""llama.cpp's names, written out by hand."""


def family_folder(folder: Path, family: str, *, changes: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Write a tiny model whose configuration GGUF can express, with two key heads for four query heads."""
    model = tiny_model_folder(folder, family, **settings)
    config = AutoConfig.from_pretrained(model)
    sizes = {"num_attention_heads": 4, "head_dim": 4, "num_key_value_heads": 2, "moe_intermediate_size": 12}
    sizes |= {"shared_expert_intermediate_size": 20, "num_experts": 4, "num_local_experts": 4}
    for key, value in {
        **sizes,
        **({"norm_topk_prob": True} if family in NORMALIZED else {}),
        **(changes or {}),
    }.items():
        if hasattr(config, key) or key in (changes or {}) or key == "norm_topk_prob":
            setattr(config, key, value)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.get("dtype", "float32")))
    for parameter in made.parameters():
        if parameter.ndim == 1:  # norms begin with ones, biases with zeros
            parameter.data.uniform_(0.5, 1.5)
    (model / "model.safetensors").unlink()
    made.save_pretrained(model)
    return model


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def hub_name(name: str, expert: int = 0) -> str:
    """Return the tensor of a Llama or a Mixtral for llama.cpp's name."""
    *block, kind, _ = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{LLAMA_NAMES[kind].format(expert)}.weight"


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows as the loop: in each head, row i of the first half and row i of the second half are neighbours."""
    rows, size = [], len(weight) // heads
    for head in range(heads):
        for index in range(size // 2):
            rows += [weight[head * size + index], weight[head * size + size // 2 + index]]
    return np.stack(rows)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_every_tensor_is_that_of_the_model(family: str, tmp_path: Path) -> None:
    model = family_folder(tmp_path / "model", family)
    export_model(model, "gguf", tmp_path / "out.gguf")
    stored = {name: tensor.numpy() for name, tensor in load_file(model / "model.safetensors").items()}
    read = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    used = set()
    for tensor in read:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        experts = range(4) if "_exps" in tensor.name else [None]
        parts = tensor.data if "_exps" in tensor.name else [tensor.data]
        for expert, part in zip(experts, parts, strict=True):
            name = hub_name(tensor.name, expert or 0)
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            expected = stored[name] if heads is None else in_pairs(stored[name], heads)
            np.testing.assert_array_equal(part, expected)
            used.add(name)
    assert used == stored.keys()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_same_model_from_the_file(family: str, tied: bool, tmp_path: Path) -> None:
    # all experts of Qwen2-MoE, whose gates do not sum to 1 otherwise
    changes = {"num_experts_per_tok": {"qwen2_moe": 4, "qwen3_moe": 2}[family]} if "moe" in family else {}
    model = family_folder(tmp_path / "model", family, tied=tied, changes=changes)
    export_model(model, "gguf", tmp_path / "out" / "model.gguf")
    # its reader leaves some sizes at their defaults: the width of heads, and of a mixture's experts
    config = {"config": AutoConfig.from_pretrained(model)} if family.startswith(("qwen3", "qwen2_moe")) else {}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", **config).eval()
    expected = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(read(TOKENS).logits, expected(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_transformers_reads_the_same_tokenizer_from_the_file(tmp_path: Path) -> None:
    model = family_folder(tmp_path / "model", "llama")
    export_model(model, "gguf", tmp_path / "out" / "model.gguf")
    own = Tokenizer.from_file(str(model / "tokenizer.json"))
    content = fields(tmp_path / "out" / "model.gguf")
    assert content["tokenizer.ggml.tokens"] == [own.id_to_token(number) for number in range(own.get_vocab_size())]
    merges = read_json(model / "tokenizer.json")["model"]["merges"]
    assert content["tokenizer.ggml.merges"] == [
        merge if isinstance(merge, str) else " ".join(merge) for merge in merges
    ]
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "The quick brown fox's café <|endoftext|> jumps"
    assert read(text, add_special_tokens=False).input_ids == own.encode(text).ids


def test_the_metadata_are_the_configuration_and_the_lineage(tmp_path: Path, new_workspace: Any) -> None:
    workspace = Workspace(
        new_workspace(tmp_path / "ws", ("code", "law"), family="llama", changed="model.layers.*.mlp.*")
    )
    merged = workspace.merge("forest", method="mixture", options={"router": "random"})
    workspace.export("forest", "gguf", tmp_path / "forest.gguf", {"dtype": "bf16"})
    content = fields(tmp_path / "forest.gguf")
    assert (
        content
        | {
            "general.architecture": "llama",
            "general.name": "forest",
            "general.license": merged.licence,
            "general.base_model.count": 3,
            "general.base_model.0.name": "seed",
            "general.base_model.2.name": "law",
            "general.file_type": gguf.LlamaFileType.MOSTLY_BF16,
            "expertctl.digest": merged.digest,
            "llama.block_count": 2,
            "llama.context_length": 128,
            "llama.embedding_length": 16,
            "llama.feed_forward_length": 24,
            "llama.attention.head_count": 2,
            "llama.attention.head_count_kv": 2,
            "llama.attention.layer_norm_rms_epsilon": content["llama.attention.layer_norm_rms_epsilon"],
            "llama.rope.dimension_count": 8,
            "llama.rope.freq_base": 10000.0,
            "llama.expert_count": 2,
            "llama.expert_used_count": 2,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.add_bos_token": False,
        }
        == content
    )
    assert content["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "forest.gguf").tensors}
    assert kinds["blk.0.ffn_gate_exps.weight"] == kinds["output.weight"] == "BF16"
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_matrices_are_rounded_once_to_the_dtype(dtype: str, tmp_path: Path) -> None:
    model = family_folder(tmp_path / "model", "olmo2")
    export_model(model, "gguf", tmp_path / "out.gguf", {"dtype": dtype})
    stored = load_file(model / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    read = next(t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name == "blk.1.attn_q.weight")
    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    content = torch.frombuffer(bytearray(read.data.tobytes()), dtype=kind)
    assert torch.equal(content, stored.to(kind).flatten())  # no reordering: llama.cpp rotates this family's halves


def test_a_tied_head_is_written_where_llama_cpp_requires_it(tmp_path: Path) -> None:
    for family, is_written in (("olmo2", True), ("llama", False)):
        export_model(family_folder(tmp_path / family, family, tied=True), "gguf", tmp_path / f"{family}.gguf")
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / f"{family}.gguf").tensors}
        assert ("output.weight" in tensors) == is_written
        if is_written:
            np.testing.assert_array_equal(tensors["output.weight"], tensors["token_embd.weight"])


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    model = family_folder(tmp_path / "model", "llama")
    network = AutoModelForCausalLM.from_pretrained(model)
    network.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    network.save_pretrained(model)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight.*bf16"):
        export_model(model, "gguf", tmp_path / "out.gguf", {"dtype": "f16"})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_that_reads_back_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_folder(tmp_path / "model", "mixtral")
    write = gguf_file.write_file

    def damaged(path: Path, *arguments: Any) -> None:
        write(path, *arguments)
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(gguf_file, "write_file", damaged)
    with pytest.raises(UserError, match="read back"):
        export_model(model, "gguf", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export_model(model, "gguf", tmp_path / "out.gguf", {"verify": False})
    assert (tmp_path / "out.gguf").is_file()


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt2", {}, "does not map"),
        ("llama", {"hidden_act": "gelu"}, "activation"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 2}, "norm_topk_prob"),
        ("qwen2_moe", {"norm_topk_prob": True, "num_experts_per_tok": 2}, "norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "no experts"),
        ("olmoe", {"clip_qkv": 3.0, "norm_topk_prob": False, "num_experts_per_tok": 2}, "clip_qkv"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE"),
        ("qwen2", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    if family == "gpt2":
        model = tiny_model_folder(tmp_path / "model", family)
    elif "quantization_config" in changes:
        model = tiny_model_folder(tmp_path / "model", family)
        write_json(model / "config.json", read_json(model / "config.json") | changes)
    else:
        model = family_folder(tmp_path / "model", family, changes=changes)
    with pytest.raises(UserError, match=reason):
        export_model(model, "gguf", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_sliding_window_limits_the_context(tmp_path: Path) -> None:
    model = family_folder(tmp_path / "model", "mistral", changes={"sliding_window": 32})
    done = export_model(model, "gguf", tmp_path / "out.gguf")
    assert "32 tokens" in done.notes[0]
    assert fields(tmp_path / "out.gguf")["llama.context_length"] == 32


def test_the_rope_of_llama_3_is_that_of_transformers(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = family_folder(tmp_path / "model", "llama", changes={"rope_parameters": rope, "head_dim": 32})
    config = AutoConfig.from_pretrained(model)
    factors = rope_factors(config, 32)
    assert factors is not None
    assert len(set(factors.tolist())) >= 3  # kept, stretched and interpolated ones
    frequencies = 1 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(frequencies / factors, ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0])
    export_model(model, "gguf", tmp_path / "out.gguf")
    (read,) = (t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name == "rope_freqs.weight")
    np.testing.assert_array_equal(read.data, factors.numpy())


WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pattern", "ignore_merges", "name"),
    [
        (WORDS % "", False, "qwen2"),
        (WORDS % "{1,3}", True, "llama-bpe"),
        (WORDS % "{1,3}", False, "dbrx"),
        (r"\w+", False, None),
    ],
)
def test_the_rule_that_splits_text_is_recognised_or_refused(
    model_folder: Path, pattern: str, ignore_merges: bool, name: str | None, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    write_json(folder / "tokenizer.json", content)
    if name is None:
        with pytest.raises(UserError, match="pre=NAME"):
            read_vocabulary(folder, 310)
        name = read_vocabulary(folder, 310, "mine").pre
        assert name == "mine"
    else:
        vocabulary = read_vocabulary(folder, 310)
        assert vocabulary.pre == name
        assert vocabulary.tokens[-1] == "[PAD309]"
        assert vocabulary.types[-1] == gguf.TokenType.UNUSED
        assert vocabulary.types[0] == gguf.TokenType.CONTROL


def test_tokenizers_that_are_no_byte_level_bpe_are_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    content = read_json(folder / "tokenizer.json")
    write_json(folder / "tokenizer.json", content | {"model": content["model"] | {"byte_fallback": True}})
    with pytest.raises(UserError, match="SentencePiece"):
        read_vocabulary(folder, 310)
    write_json(folder / "tokenizer.json", content)
    with pytest.raises(UserError, match="rows of embeddings"):
        read_vocabulary(folder, 100)


def test_an_existing_folder_is_no_place_for_a_file(tmp_path: Path) -> None:
    model = family_folder(tmp_path / "model", "llama")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="writes a file"):
        export_model(model, "gguf", tmp_path / "out", force=True)
    (tmp_path / "out.gguf").write_text("old")
    with pytest.raises(UserError, match="--force"):
        export_model(model, "gguf", tmp_path / "out.gguf")
    export_model(model, "gguf", tmp_path / "out.gguf", force=True)
    assert fields(tmp_path / "out.gguf")["general.name"] == "model"
