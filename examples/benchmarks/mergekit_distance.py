"""Differences between mergekit's results and ours on the same files, for each method.

    python examples/benchmarks/mergekit_distance.py --mergekit /path/to/other/environment/bin/mergekit-yaml

Both tools merge the same small random Llama and Qwen2 models (the latter with biases), tied and untied, in float32 and
bfloat16. The table lists for each method the share of equal numbers, the largest difference in units in the last place,
and the Frobenius norm of the difference relative to that of the task vectors. Methods with random masks are omitted,
since the two tools draw different masks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from whole_numbers import at_least

from expertctl import MergeRun, merge_recipe, read_mergekit

WEIGHTED = ({"weight": 0.3, "density": 0.4}, {"weight": 1.1, "density": 0.6}, {"weight": 0.7, "density": 0.5})
GRADIENT = [{"filter": "mlp", "value": [0.0, 0.8]}, {"filter": "self_attn", "value": 0.25}, {"value": 0.5}]
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"models": ("a", "b", "c")},
    "linear, equal weights": {"models": ("a", "b", "c"), "equal": True},
    "linear, not normalised": {"models": ("a", "b"), "parameters": {"normalize": False}},
    "linear, gradients": {"models": ("a", "b"), "gradient": True},
    "passthrough, stacked": {"slices": (("a", [0, 2]), ("b", [1, 3]))},
    "passthrough, scaled": {"models": ("a",), "parameters": {"scale": 0.7}},
    "slerp": {"models": ("base", "a"), "base_model": "base", "parameters": {"t": 0.3}},
    "slerp, gradients": {"models": ("base", "a"), "base_model": "base", "parameters": {"t": GRADIENT}},
    "nuslerp": {"models": ("a", "b")},
    "nuslerp, task vectors": {"models": ("a", "b"), "base_model": "base"},
    "multislerp": {"models": ("a", "b", "c")},
    "karcher": {"models": ("a", "b", "c")},
    "task_arithmetic": {"models": ("a", "b", "c"), "base_model": "base", "parameters": {"lambda": 0.8}},
    "ties": {"models": ("a", "b", "c"), "base_model": "base"},
    "breadcrumbs": {"models": ("a", "b", "c"), "base_model": "base"},
    "breadcrumbs_ties": {"models": ("a", "b", "c"), "base_model": "base"},
    "sce": {"models": ("a", "b", "c"), "base_model": "base", "parameters": {"select_topk": 0.5}},
    "model_stock": {"models": ("a", "b", "c"), "base_model": "base"},
    "nearswap": {"models": ("a",), "base_model": "base", "parameters": {"t": 0.01}},
}
UNWEIGHTED = ("karcher", "slerp", "model_stock", "sce", "nearswap", "passthrough", "arcee_fusion")
MODELS = [
    ("llama", False, "bfloat16"),
    ("llama", False, "float32"),
    ("llama", True, "bfloat16"),
    ("qwen2", False, "bfloat16"),
    ("qwen2", True, "float32"),
]


@dataclass(frozen=True)
class Distance:
    """Differences between two results."""

    equal: int
    numbers: int
    ulps: int
    relative: float
    """Length of the difference over that of the task vectors."""


def make_models(folder: Path, family: str, tied: bool, dtype: str, names: Sequence[str]) -> None:
    """Write a base model and models derived from it as Hugging Face folders with tokenizers; one model is sharded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, vocab_size=256, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    words = Tokenizer(models.BPE({chr(33 + number): number for number in range(200)}, [], unk_token="!"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="!")
    for number, name in enumerate(names):
        torch.manual_seed(number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(base[key] + (0.01 * torch.randn(parameter.shape) if number else 0))
        copy = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
        copy.load_state_dict(model.state_dict())
        copy.save_pretrained(folder / name, max_shard_size="60KB" if number == 1 else "1GB")
        tokenizer.save_pretrained(folder / name)


def write_recipe(folder: Path, title: str, given: dict[str, Any]) -> Path:
    """Write a mergekit configuration file."""
    method = title.partition(",")[0]
    content: dict[str, Any] = {"merge_method": method}
    if "slices" in given:
        content["slices"] = [{"sources": [{"model": model, "layer_range": pair}]} for model, pair in given["slices"]]
    else:
        content["models"] = [
            {"model": name, "parameters": _parameters(method, number, given)}
            for number, name in enumerate(given["models"])
        ]
    content |= {key: given[key] for key in ("base_model", "parameters") if key in given}
    path = folder / "recipe.yml"
    path.write_text(json.dumps(content))
    return path


def _parameters(method: str, number: int, given: dict[str, Any]) -> dict[str, Any]:
    if method in UNWEIGHTED:
        return {}
    if given.get("equal"):
        return {"weight": 1.0}
    if given.get("gradient"):
        return {"weight": [{"filter": "mlp", "value": [0.1 + number, 1.0]}, {"value": 0.6}]}
    keys = ("weight", "density") if method in ("ties", "breadcrumbs", "breadcrumbs_ties") else ("weight",)
    return {key: WEIGHTED[number][key] for key in keys}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], change: float) -> Distance:
    """Compare all tensors; `change` is the Frobenius norm of the task vectors."""
    names = sorted(ours.keys() & theirs.keys())
    assert ours.keys() - {"lm_head.weight"} == theirs.keys() - {"lm_head.weight"}, "different tensors"
    equal = sum(int((ours[name] == theirs[name]).sum()) for name in names)
    numbers = sum(ours[name].numel() for name in names)
    ulps = max(int((_ordered(ours[name]) - _ordered(theirs[name])).abs().max()) for name in names)
    squares = sum(float(((ours[name].double() - theirs[name].double()) ** 2).sum()) for name in names)
    return Distance(equal, numbers, ulps, squares**0.5 / change)


def _ordered(tensor: torch.Tensor) -> torch.Tensor:
    """Return floats as integers that count units in the last place from zero."""
    bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).to(torch.int64)
    lowest = -(1 << (8 * tensor.element_size() - 1))
    return torch.where(bits < 0, lowest - bits, bits)


def task_vector_length(folder: Path) -> float:
    base, other = tensors_of(folder / "base"), tensors_of(folder / "a")
    return sum(float(((other[name].double() - base[name].double()) ** 2).sum()) for name in base) ** 0.5


def compare(folder: Path, mergekit: Path, title: str, given: dict[str, Any], number: int) -> Distance:
    """Merge with both tools and compare the results."""
    recipe = write_recipe(folder, title, given)
    ours, theirs = folder / f"ours{number}", folder / f"theirs{number}"
    here = Path.cwd()
    os.chdir(folder)  # models are named relative to it
    try:
        merge_recipe(read_mergekit(recipe), ours, run=MergeRun())
    finally:
        os.chdir(here)
    # without a network mergekit dies after it has written the weights
    command = [str(mergekit), str(recipe), str(theirs)]
    subprocess.run(command, cwd=folder, capture_output=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return distance(tensors_of(ours), tensors_of(theirs), task_vector_length(folder))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="mergekit-yaml of another environment")
    parser.add_argument("--models", type=at_least(1), default=len(MODELS), help="number of models to merge")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    given = parser.parse_args(arguments)
    print("| method | model | numbers the same | furthest, units in the last place | difference / task vectors |")
    print("|---|---|---:|---:|---:|")
    for family, tied, dtype in MODELS[: given.models]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_models(folder, family, tied, dtype, ("base", "a", "b", "c"))
            for number, title in enumerate(given.methods):
                row = compare(folder, given.mergekit, title, METHODS[title], number)
                name = f"{family}, {'tied' if tied else 'untied'}, {dtype}"
                share = f"{row.equal / row.numbers:.4%}" if row.equal < row.numbers else "all"
                print(f"| {title} | {name} | {share} | {row.ulps:,} | {row.relative:.1e} |", flush=True)


if __name__ == "__main__":
    main()
