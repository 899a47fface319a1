"""Grouping of tensor names by decoder layer."""

from __future__ import annotations

from expertctl.merge.sources.tensor_names import layer_names

LLAMA = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def test_a_llama_has_layers_with_embeddings_before_and_norm_and_head_after_them() -> None:
    names = layer_names(LLAMA)
    assert names.stack == "model.layers"
    assert names.layers == (("mlp.up_proj.weight", "self_attn.q_proj.weight"),) * 2
    assert names.before == ("model.embed_tokens.weight",)
    assert names.after == ("model.norm.weight", "lm_head.weight")
    assert names.name(1, "mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"


def test_the_order_of_a_file_does_not_matter() -> None:
    names = layer_names(reversed(LLAMA))
    assert [set(layer) for layer in names.layers] == [set(layer) for layer in layer_names(LLAMA).layers]
    assert set(names.after) == set(layer_names(LLAMA).after)


def test_experts_within_a_layer_are_no_layers() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w1" for layer in range(2) for expert in range(8)]
    assert [len(layer) for layer in layer_names(names).layers] == [8, 8]


def test_a_small_other_stack_stands_outside() -> None:
    names = layer_names([*LLAMA, "vision.blocks.0.weight"])
    assert names.stack == "model.layers"
    assert "vision.blocks.0.weight" in names.after


def test_gpt2_and_a_model_without_layers() -> None:
    assert layer_names(["wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "ln_f.weight"]).before == (
        "wte.weight",
        "wpe.weight",
    )
    assert layer_names(["weight", "bias"]).layers == ()
