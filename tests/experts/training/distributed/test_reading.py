"""Processes that share a model read their own rows of its files, and never hold all of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import half_readers
import pytest
import torch
from distributed_runs import TORCHRUN, losses_of, records_of, train_together
from flexolmo_workspaces import make_flexolmo_workspace
from tiny_families import family_folder

from expertctl import Reporter
from expertctl.core.artefacts.safetensors_io import Checkpoint
from expertctl.core.models.loading import load_network
from expertctl.core.models.outline import outline_of
from expertctl.core.models.stored_names import checkpoint_tensors
from expertctl.experts.training.run import LOADED_WHOLE, train_run

SLACK_BYTES = 20e6
"""Memory of gloo, the allocator and the first use of operations, beside the model."""


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "mixtral", "olmoe", "flex_olmo"])
def test_an_outline_reads_what_transformers_loads(family: str, tmp_path: Path) -> None:
    """Also the buffers that no file has, such as the frequencies of rotary embeddings."""
    folder = family_folder(tmp_path, family)
    outline, model = outline_of(folder), load_network(folder, dtype="float32")
    assert outline is not None
    assert all(parameter.is_meta for parameter in outline.model.parameters())
    for name, tensor in checkpoint_tensors(model).items():
        assert torch.equal(outline.read(name), tensor), name
        assert torch.equal(outline.span(name, 3, 12), tensor.flatten()[3:12]), name
    persistent = model.state_dict()
    for name, buffer in model.named_buffers():
        if name not in persistent:
            assert torch.equal(outline.model.get_buffer(name), buffer), name


def test_files_with_both_of_two_tied_tensors_are_loaded_whole(tmp_path: Path) -> None:
    """transformers ties them only if they are equal."""
    from safetensors.torch import load_file, save_file

    folder = family_folder(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert outline_of(folder) is None
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert outline_of(folder) is not None


@pytest.mark.slow
def test_a_process_reads_and_holds_its_half_of_a_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 4000}
    config = LlamaConfig(hidden_size=512, intermediate_size=2048, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    largest = max(sum(4 * parameter.numel() for parameter in layer.parameters()) for layer in model.model.layers)
    command = [*TORCHRUN, "--nproc-per-node=2", half_readers.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    processes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(processes) == 2
    for process in processes:
        assert process["read"] == pytest.approx(size / 2, rel=1e-3)  # 4,000 rows and all matrices are even
        assert process["peak"] < size / 2 + largest + SLACK_BYTES < 0.8 * size
        assert process["tied"]
    assert sum(process["total"] for process in processes) == pytest.approx(
        sum(float(parameter.detach().double().sum()) for parameter in model.parameters()), rel=1e-6
    )


@pytest.mark.slow
def test_losses_are_those_of_one_process_for_tied_embeddings_and_averages_of_experts(tmp_path: Path) -> None:
    """The tied matrix, the frozen parts and the average of two models come from files by rows."""
    root = tmp_path / "workspace"
    workspace = make_flexolmo_workspace(root, "llama", owners=("prose",), tied=True, trains="all")
    training = {"tokens": 10 * 4 * 32, "log_every": 1, "learning_rate": 5e-3, "device": "cpu"}
    for suffix in ("", "-alone"):
        workspace.branch(f"seeded{suffix}", domain="means", trains="all", training=training)
        start = {"seed": 0.25, "prose": 0.75}
        workspace.branch(f"averaged{suffix}", domain="means", from_=start, trains="feed_forward", training=training)
    workspace.branch(
        "public-alone", domain="means", trains="flexolmo", options={"public": "public", "samples": 4}, training=training
    )
    runs = ("experts/seeded", "experts/averaged", "experts/public-alone")
    train_together(root, "fsdp", *runs)
    for run in runs[:2]:
        train_run(root / f"{run}-alone", Reporter(), lambda: False)
        assert losses_of(root, run) == pytest.approx(losses_of(root, f"{run}-alone"), abs=1e-4), run
        assert LOADED_WHOLE not in records_of(root)[run]["notes"]
    names = [set(Checkpoint([root / run / "model.safetensors"])) for run in ("experts/seeded", "experts/seeded-alone")]
    assert names[0] == names[1]
    assert "lm_head.weight" not in names[0]
    assert LOADED_WHOLE in records_of(root)[runs[2]]["notes"]
