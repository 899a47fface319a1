"""Model folders and recipes for tests of the merge engine: no architecture behind them, only tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from expertctl.core.hooks.manager import installed_plugins
from expertctl.core.hooks.merging import MergeMethod
from expertctl.merge.engine.calculator import EngineSettings, Written, run_merge
from expertctl.merge.engine.reading import PIECE_NUMBERS
from expertctl.merge.engine.shards import plan_shards
from expertctl.merge.planning.tensor_planner import plan_tensors
from expertctl.merge.recipes.recipe import Recipe, whole_models
from expertctl.merge.sources.models import open_sources

Tensors = dict[str, torch.Tensor]


def random_tensors(
    seed: int, *, layers: int = 2, width: int = 4, rows: int = 6, dtype: torch.dtype = torch.float32
) -> Tensors:
    """Return tensors named like a small Llama's."""
    source = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source).to(dtype)

    tensors = {"model.embed_tokens.weight": some(rows, width)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = some(width, width)
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = some(2 * width, width)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = some(width)
    return {**tensors, "model.norm.weight": some(width), "lm_head.weight": some(rows, width)}


def write_model(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: Sequence[Sequence[str]] = (), **config: Any
) -> Path:
    """Write a Hugging Face folder; `shards` gives the tensors of each file, else there is one."""
    folder.mkdir(parents=True)
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    rows = len(tensors.get("model.embed_tokens.weight", ()))
    settings = {
        "model_type": "llama",
        "num_hidden_layers": len(layers),
        "vocab_size": rows,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    (folder / "config.json").write_text(json.dumps(settings | config))
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if not shards:
        save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, group in zip(names, shards, strict=True):
        save_file({name: plain[name] for name in group}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, group in zip(names, shards, strict=True) for name in group}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def recipe(method: str, models: Mapping[str, Path], *, seed: str | None = None, **settings: Any) -> Recipe:
    """Return a recipe over whole models; `weights` by name, `options` for all, the rest as `Recipe` takes it."""
    weights = settings.pop("weights", {})
    options = settings.pop("options", {})
    experts = [name for name in models if name != seed]
    slices = settings.pop(
        "slices", whole_models(experts, {name: {"weight": weight} for name, weight in weights.items()})
    )
    return Recipe(method, dict(models), slices, seed, scopes=(options,), **settings)


def engine_merge(
    what: Recipe,
    output: Path,
    *,
    method: MergeMethod | None = None,
    shard_bytes: int = 10**9,
    threads: int = 2,
    pieces: int = PIECE_NUMBERS,
    settings: EngineSettings | None = None,
) -> Written:
    """Plan and run a merge with the engine alone: no checks of relatedness, licences or tokenizers."""
    chosen = method or installed_plugins().offer(MergeMethod, what.method)
    stack = plan_tensors(what, chosen, open_sources(what.models, what.seed, what.adapter_bases))
    shards = plan_shards(stack.tensors, shard_bytes)
    output.mkdir(exist_ok=True)
    return run_merge(
        chosen,
        shards,
        output,
        fingerprint="test",
        round_to=what.input_dtype,
        settings=settings or EngineSettings(threads=threads, piece_numbers=pieces),
    )


def tensors_of(folder: Path) -> Tensors:
    """Return all tensors of a folder, by the library everybody uses."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
