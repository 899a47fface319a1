"""LoRA adapters: same result as peft's merge, and refused adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_models import engine_merge, recipe, tensors_of

from expertctl.core.artefacts.safetensors_io import Checkpoint
from expertctl.core.errors import UserError
from expertctl.core.models.adapters.lora import Adapter
from expertctl.merge.merging import merge_recipe
from expertctl.merge.recipes.recipe import Recipe
from expertctl.merge.sources.models import open_source

peft = pytest.importorskip("peft")

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "gpt2": {"tie_word_embeddings": True},
}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
}
GPT2_SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}


def base_model(folder: Path, family: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = GPT2_SIZES if family == "gpt2" else SIZES
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **(CONFIGS[family] | settings)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def adapted(folder: Path, model: Any, **settings: Any) -> dict[str, torch.Tensor]:
    """Save an adapter whose every part is random, and return the tensors of peft's own merge."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = 0.2 * torch.randn(parameter.shape, generator=source)
                parameter.copy_(parameter.abs() + 0.1 if "magnitude" in name else parameter + noise)
    wrapped.eval()
    wrapped.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in wrapped.merge_and_unload().state_dict().items()}


LINEAR = ["q_proj", "v_proj", "down_proj"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4, "lora_alpha": 8, "target_modules": LINEAR}),
    ("llama", {"r": 8, "lora_alpha": 3, "target_modules": ["k_proj"], "use_rslora": True}),
    ("llama", {"r": 16, "target_modules": "all-linear"}),
    ("llama", {"r": 4, "target_modules": LINEAR, "use_dora": True}),
    (
        "llama",
        {
            "r": 4,
            "target_modules": LINEAR,
            "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"v_proj": 32},
        },
    ),
    ("llama", {"r": 4, "target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]}),
    ("llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    ("llama", {"r": 4, "target_modules": ["lm_head"]}),
    ("qwen2", {"r": 4, "target_modules": LINEAR, "bias": "all"}),
    ("qwen2", {"r": 4, "target_modules": LINEAR, "bias": "lora_only"}),
    ("qwen2", {"r": 4, "target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "settings"), CASES, ids=lambda value: str(value)[:60])
def test_an_adapter_gives_what_peft_merges(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    model = base_model(tmp_path / "base", family)
    expected = adapted(tmp_path / "lora", model, **settings)
    base = Checkpoint.of_folder(tmp_path / "base")
    adapter = Adapter.open(tmp_path / "lora", base.entries)
    assert adapter.changes
    for name in base:
        own = base.read(name).numpy()
        full = name if name in expected else f"transformer.{name}"
        changed = adapter.apply(name, own) if name in adapter.changes else own
        np.testing.assert_allclose(changed, expected[full].numpy(), rtol=2e-6, atol=2e-6, err_msg=name)
        assert (name in adapter.changes) or np.array_equal(own, expected[full].numpy()), name


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_different_ranks_and_targets_merge_as_full_models(tmp_path: Path) -> None:
    models = {}
    wanted = []
    for number, (rank, targets) in enumerate([(4, ["q_proj"]), (8, ["q_proj", "v_proj"]), (16, ["down_proj"])]):
        model = base_model(tmp_path / "base", "llama")
        wanted.append(adapted(tmp_path / f"a{number}", model, r=rank, target_modules=targets))
        models[f"a{number}"] = tmp_path / f"a{number}"
    what = recipe("linear", {"seed": tmp_path / "base", **models}, seed="seed")
    merged = with_seed(what, tmp_path / "out")
    for name, tensor in merged.items():
        expected = sum(adapter[name].double() for adapter in wanted) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


def with_seed(what: Recipe, output: Path) -> dict[str, torch.Tensor]:
    seed = open_source("seed", what.models["seed"])
    assert all(open_source(name, what.models[name], seed).adapter for name in what.experts)
    engine_merge(what, output)
    return tensors_of(output)


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter on it, to be spoilt."""
    model = base_model(tmp_path / "base", "llama")
    adapted(tmp_path / "lora", model, r=4, target_modules=["q_proj"])
    return tmp_path / "base", tmp_path / "lora"


def opened(folders: tuple[Path, Path]) -> str:
    base, lora = folders
    with pytest.raises(UserError) as caught:
        assert open_source("lora", lora, open_source("base", base)).adapter is None
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"layer_replication": [[0, 1]]}, "repeats layers"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"target_parameters": ["experts.w1"]}, "not the weight of a module"),
        ({"trainable_token_indices": [1]}, "single tokens"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed the base model's weights"),
        ({"init_lora_weights": "olora"}, "changed the base model's weights"),
    ],
)
def test_inexact_adapters_are_refused(plain: tuple[Path, Path], settings: dict[str, Any], part: str) -> None:
    change(plain[1], **settings)
    assert part in opened(plain)


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_do_not_fit_are_refused(plain: tuple[Path, Path]) -> None:
    path = plain[1] / "adapter_model.safetensors"
    good = load_file(path)
    first = next(iter(good))
    save_file(
        {
            **good,
            "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 16),
            "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": torch.ones(16, 4),
        },
        path,
    )
    assert "which the base model does not have" in opened(plain)
    save_file({key: tensor for key, tensor in good.items() if key != first}, path)
    assert "only one of its factors" in opened(plain)
    save_file({key: torch.ones(4, 9) if "lora_A" in key else tensor for key, tensor in good.items()}, path)
    assert "is [16, 9]" in opened(plain)
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight": torch.ones(2)}, path)
    assert "lora_C" in opened(plain)
    path.unlink()
    (plain[1] / "adapter_model.bin").write_bytes(b"x")
    assert "refused because loading them can run code" in opened(plain)


@pytest.mark.filterwarnings("ignore")
def test_an_adapted_embedding_that_is_the_output_head_too_is_refused(tmp_path: Path) -> None:
    model = base_model(tmp_path / "base", "gpt2")
    adapted(tmp_path / "lora", model, r=2, target_modules=["wte"])
    assert "output head" in opened((tmp_path / "base", tmp_path / "lora"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("trained", "is_tied"),
    [
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, True),
    ],
    ids=str,
)
def test_a_retrained_embedding_or_head_of_a_tied_base(tmp_path: Path, trained: dict[str, Any], is_tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = base_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    expected = adapted(tmp_path / "lora", model, r=4, target_modules=["q_proj"], **trained)
    models = {"base": tmp_path / "base", "lora": tmp_path / "lora"}
    merge_recipe(recipe("linear", models, seed="base", weights={"lora": 1.0}), tmp_path / "out")
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert merged.config.tie_word_embeddings is is_tied
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_without_its_base_is_refused(plain: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="needs the model it was trained on"):
        open_source("lora", plain[1])


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_is_not_finite_is_named(plain: tuple[Path, Path], tmp_path: Path) -> None:
    path = plain[1] / "adapter_model.safetensors"
    factors = load_file(path)
    factors[next(key for key in factors if "lora_B" in key)][0, 0] = float("nan")
    save_file(factors, path)
    what = recipe("linear", {"base": plain[0], "lora": plain[1]}, seed="base", weights={"lora": 1.0})
    with pytest.raises(UserError, match=r"q_proj.weight' contains NaN or infinity according to .*adapter_model"):
        merge_recipe(what, tmp_path / "out")
