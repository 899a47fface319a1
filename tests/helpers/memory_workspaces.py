"""Workspaces with text, for memories; and their keys and distributions as the paper writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertctl.core.manifests.manifest import Parent
from expertctl.core.models.decoding.memories.manifest import (
    KEYS_FILE,
    VALUES_FILE,
    IndexRecord,
    MemoryManifest,
    read_memory,
)

TEXTS = {
    "law": "Whereas the parties agree that the court of the first instance decides. ",
    "code": "def area(width, height):\n    return width * height\n",
}


def text_config(root: Path, *, documents: int = 8) -> str:
    """Write the text of two domains below a folder; return the project file."""
    domains = {}
    for name, text in TEXTS.items():
        for part in ("train", "valid", "test"):
            path = root / f"{name}-{part}.jsonl"
            count = documents if part == "train" else 2
            lines = [json.dumps({"text": text * 2 + f"{part} {number}"}) + "\n" for number in range(count)]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")
            domains.setdefault(name, {})[part] = str(path)
    return json.dumps({"training": {"sequence_length": 32}, "domains": domains})


def stored(folder: Path) -> tuple[Tensor, list[int]]:
    """Return the keys of a memory in float64, and its tokens."""
    memory = read_memory(folder)
    keys = np.fromfile(folder / KEYS_FILE, dtype=np.float16).reshape(memory.keys, memory.width)
    return torch.from_numpy(keys.astype(np.float64)), np.fromfile(folder / VALUES_FILE, dtype=np.int32).tolist()


def naive_key(model: Any, text: list[int]) -> Tensor:
    """Return the key behind a text, (d,): for Llama the output of the norm before the last FFN, else the final hidden state."""
    if model.config.model_type != "llama":
        with torch.no_grad():
            return model.model(input_ids=torch.tensor([text])).last_hidden_state[0, -1]
    found = []
    hook = model.model.layers[-1].post_attention_layernorm.register_forward_hook(
        lambda module, arguments, output: found.append(output)
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([text]), use_cache=False)
    hook.remove()
    return found[0][0, -1]


def naive_log_probs(
    model: Any, memories: list[tuple[Tensor, list[int]]], text: list[int], k: int, temperature: float, weight: float
) -> Tensor:
    """Return the interpolated distribution of the next token in float64, (V,)."""
    key = naive_key(model, text)
    pairs = [
        (float(((one - key) ** 2).sum()), token)
        for keys, tokens in memories
        for one, token in zip(keys, tokens, strict=True)
    ]
    nearest = sorted(pairs, key=lambda pair: pair[0])[:k]
    with torch.no_grad():
        model_V = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].softmax(-1)
    masses = [np.exp(-(distance - nearest[0][0]) / temperature) for distance, _ in nearest]
    knn_V = torch.zeros_like(model_V)
    for mass, (_, token) in zip(masses, nearest, strict=True):
        knn_V[token] += mass / sum(masses)
    return (weight * knn_V + (1 - weight) * model_V).log()


def write_memory(folder: Path, keys: np.ndarray, values: list[int], index: IndexRecord | None = None) -> Path:
    """Write a memory that no model made, but for its index; return its folder."""
    folder.mkdir()
    keys.astype(np.float16).tofile(folder / KEYS_FILE)
    np.array(values, dtype=np.int32).tofile(folder / VALUES_FILE)
    texts: dict[str, Any] = {"kind": "memory", "name": folder.name, "function": "", "tokenizer": ""}
    counts: dict[str, Any] = {"keys": len(keys), "width": keys.shape[1], "window": 1, "context": 0}
    MemoryManifest(
        model=Parent("seed", "seed", ""),
        domains={},
        domain_keys={},
        key="final_hidden_state",
        index=index or IndexRecord("exact"),
        **texts,
        **counts,
    ).write(folder)
    return folder
