"""Dense models and native mixtures have the files that vLLM reads: a known architecture, the hub's tensors, a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors import safe_open

from expertctl.workspace import Workspace


@pytest.mark.parametrize(
    ("family", "method", "options", "architecture"),
    [
        ("olmo2", "linear", {}, "Olmo2ForCausalLM"),
        ("olmo2", "btx", {}, "FlexOlmoForCausalLM"),
        ("llama", "ties", {}, "LlamaForCausalLM"),
        ("llama", "btx", {}, "MixtralForCausalLM"),
        ("qwen3", "btx", {}, "Qwen3MoeForCausalLM"),
    ],
)
def test_the_files_that_vllm_reads(
    tmp_path: Path, new_workspace: Any, family: str, method: str, options: dict[str, Any], architecture: str
) -> None:
    root = new_workspace(tmp_path / "workspace", ["code", "law"], family=family)
    Workspace(root).merge("model", method=method, experts=["code", "law"], options=options)
    folder = root / "generalists" / "model"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [architecture]
    assert not config["model_type"].startswith("expertctl_")
    assert "auto_map" not in config  # no code of the folder would have to be trusted
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in folder.iterdir()}
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    # vLLM maps the names that transformers writes
    model = getattr(transformers, architecture).from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert names == set(file.keys())
