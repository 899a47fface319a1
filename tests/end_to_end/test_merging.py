"""Merges as users run them: killed at any point, into used folders, refused in time, read by other tools."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import Tensors, random_tensors, tensors_of, write_model

import expertctl
from expertctl.core.errors import UserError
from expertctl.core.manifests.verification import verify

COMMAND = [sys.executable, "-m", "expertctl.cli.main"]
JOURNAL = ".out.unfinished/.journal.jsonl"


def run(folder: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def related(seed: int, **how: Any) -> Tensors:
    """Return tensors near those of seed 0."""
    source = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + 0.1 * torch.randn(tensor.shape, generator=source)).to(tensor.dtype)
        for name, tensor in random_tensors(0, **how).items()
    }


def recipe_file(folder: Path, method: str, models: list[str], **more: Any) -> Path:
    weighted = [{"model": name, "parameters": {"weight": 1.0}} for name in models]
    path = folder / f"{method}.yml"
    path.write_text(json.dumps({"merge_method": method, "models": weighted, **more}))
    return path


# --- a merge that dies ---


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of many tensors, and the merge that nobody stopped."""
    folder = tmp_path_factory.mktemp("large")
    for number, name in enumerate(("base", "a", "b")):
        write_model(folder / name, related(number, layers=60, width=64, rows=200, dtype=torch.bfloat16))
    recipe_file(folder, "ties", ["a", "b"], base_model="base", parameters={"density": 0.3})
    run(folder, "merge", "--config", "ties.yml", "-o", "whole/out", "--shard-size", "400KB")
    assert verify(folder / "whole" / "out") == []
    return folder


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_killed_merge_leaves_nothing_that_loads_and_resumes_to_the_same_bytes(
    large: Path, tmp_path: Path, share: float
) -> None:
    output = tmp_path / "out"
    arguments = [
        "merge",
        "--config",
        "ties.yml",
        "-o",
        str(output),
        "--shard-size",
        "400KB",
        "--threads",
        "1",
    ]
    total = len(random_tensors(0, layers=60))
    process = subprocess.Popen([*COMMAND, *arguments], cwd=large, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / JOURNAL
    while process.poll() is None and (not journal.exists() or journal.read_text().count("\n") < share * total):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    unfinished = tmp_path / ".out.unfinished"
    before = journal.read_text().count("\n") - 1
    with pytest.raises(UserError):
        expertctl.load_model(unfinished)
    told = run(large, *arguments, "--resume").stderr
    complete = re.search(rf"(\d+) of {total} tensors are already complete", told)
    assert complete is not None, told
    assert int(complete[1]) >= before - 1
    assert contents(output) == contents(large / "whole" / "out")
    assert not unfinished.exists()


@pytest.mark.slow
def test_random_kills_one_after_the_other_end_in_the_same_bytes(large: Path, tmp_path: Path) -> None:
    source = random.Random(0)
    output = tmp_path / "out"
    arguments = ["merge", "--config", "ties.yml", "-o", str(output), "--shard-size", "400KB", "--resume"]
    for _ in range(12):
        process = subprocess.Popen([*COMMAND, *arguments], cwd=large, stderr=subprocess.DEVNULL)
        time.sleep(source.uniform(0.2, 0.9))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            break
        with pytest.raises(UserError):
            expertctl.load_model(tmp_path / ".out.unfinished")
    if not output.exists():
        run(large, *arguments)
    assert contents(output) == contents(large / "whole" / "out")


def test_an_interrupted_merge_says_how_to_go_on(large: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["merge", "--config", "ties.yml", "-o", str(output), "--threads", "1"]
    process = subprocess.Popen([*COMMAND, *arguments], cwd=large, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / JOURNAL
    while process.poll() is None and not journal.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    if process.returncode == 0:
        pytest.skip("the merge was done before the signal came")
    assert process.returncode == 130
    assert "--resume" in told
    run(large, *arguments, "--resume")
    assert verify(output) == []


# --- used folders ---


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for number, name in enumerate(("a", "b", "c")):
        write_model(tmp_path / name, related(number))
    return tmp_path


def test_a_used_folder_is_left_alone_and_force_leaves_no_file_of_it(models: Path) -> None:
    """One file first, then shards: the old file must not stand beside the new ones."""
    recipe_file(models, "linear", ["a", "b"])
    run(models, "merge", "--config", "linear.yml", "-o", "out")
    before = contents(models / "out")
    recipe_file(models, "linear", ["b", "c"])
    second = ["merge", "--config", "linear.yml", "-o", "out", "--shard-size", "300"]
    assert "exists already; use --force" in run(models, *second, status=1).stderr
    assert contents(models / "out") == before
    run(models, *second, "--force")
    assert not (models / "out" / "model.safetensors").exists()
    b, c = tensors_of(models / "b"), tensors_of(models / "c")
    for name, tensor in tensors_of(models / "out").items():
        torch.testing.assert_close(tensor, (b[name] + c[name]) / 2)


# --- refused before any work ---


def spoilt(models: Path, harm: str) -> tuple[list[str], str]:
    """Return the arguments of a merge that must be refused, and what must be said."""
    recipe = ["merge", "--config", "linear.yml", "-o", "out"]
    base = related(5)
    recipe_file(models, "linear", ["a", "x"])
    if harm == "method":
        (models / "linear.yml").write_text((models / "linear.yml").read_text().replace('"linear"', '"linaer"'))
        return recipe, "did you mean 'linear'?"
    if harm == "layers":
        write_model(models / "x", related(5, layers=3))
        return recipe, "'x' has 3 layers where 'a' has 2"
    if harm == "shape":
        write_model(models / "x", related(5, width=8))
        return recipe, "but [6, 4] in 'a'"
    if harm == "dtype":
        write_model(models / "x", related(5, dtype=torch.bfloat16))
        return recipe, "is BF16 in 'x'"
    if harm == "vocabulary":
        write_model(models / "x", related(5, rows=7))
        return recipe, "6 and 7 embedding rows"
    if harm == "missing tensor":
        write_model(models / "x", {name: tensor for name, tensor in base.items() if "layers.1.mlp" not in name})
        return recipe, "tensor 'model.layers.1.mlp.up_proj.weight' is in 'a'"
    if harm == "stranger":
        write_model(models / "x", random_tensors(99, width=32, rows=40))
        write_model(models / "y", random_tensors(98, width=32, rows=40))
        recipe_file(models, "linear", ["x", "y"])
        return recipe, "appear unrelated"
    write_model(models / "x", base)
    if harm == "licence":
        (models / "x" / "README.md").write_text("---\nlicense: llama3\n---\n")
        (models / "a" / "README.md").write_text("---\nlicense: gemma\n---\n")
        return recipe, "'a' is under gemma and 'x' under llama3"
    if harm == "no folder":
        recipe_file(models, "linear", ["a", "z"])
        return recipe, "there is no folder z"
    if harm == "option":
        recipe_file(models, "linear", ["a", "x"], parameters={"normalise": True})
        return recipe, "did you mean 'normalize'?"
    if harm == "key":
        recipe_file(models, "linear", ["a", "x"], base_modle="a")
        return recipe, "did you mean 'base_model'?"
    if harm == "output":
        (models / "file").write_text("x")
        return ["merge", "--config", "linear.yml", "-o", "file/out"], "is a file"
    assert harm == "truncated"
    path = models / "x" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    return recipe, "is damaged"


HARMS = [
    "method", "layers", "shape", "dtype", "vocabulary", "missing tensor", "stranger", "licence", "no folder",
    "option", "key", "output", "truncated",
]  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("how", ["merge", "plan"])
def test_impossible_merges_are_refused_in_one_line_before_any_write(models: Path, harm: str, how: str) -> None:
    arguments, part = spoilt(models, harm)
    before = set(models.rglob("*"))
    result = run(models, *arguments, *(["--plan"] if how == "plan" else []), status=1)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert part in errors[0]
    assert set(models.rglob("*")) == before


def test_strangers_and_licences_can_be_insisted_on(models: Path) -> None:
    arguments, _ = spoilt(models, "stranger")
    run(models, *arguments, "--allow-unrelated")
    assert verify(models / "out") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(models: Path) -> None:
    recipe_file(models, "linear", ["a", "b"])
    (models / "closed").mkdir(mode=0o500)
    told = run(models, "merge", "--config", "linear.yml", "-o", "closed/out", status=1).stderr
    assert "no permission to access" in told


def test_a_plan_estimates_cost_and_reads_no_tensor(models: Path) -> None:
    recipe_file(models, "linear", ["a", "b"])
    plan = json.loads(run(models, "--json", "merge", "--config", "linear.yml", "-o", "out", "--plan").stdout)
    size = sum(tensor.numel() * 4 for tensor in random_tensors(0).values())
    assert plan["bytes_to_read"] == 2 * size
    assert sum(plan["files"].values()) == plan["bytes_to_write"] >= size
    assert set(plan["tensors"]) == set(random_tensors(0))
    assert plan["tensors"]["lm_head.weight"]["weights"] == {"a": 1.0, "b": 1.0}
    assert not (models / "out").exists()


def test_too_little_disk_is_told_with_both_figures(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from expertctl.merge.merging import merge_recipe
    from expertctl.merge.recipes.mergekit_file import read_mergekit

    recipe = read_mergekit(recipe_file(models, "linear", ["a", "b"]))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"needs 0\.00 GB, but its disk has only 0\.00 GB left; free some space"):
        merge_recipe(recipe, models / "out")
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("device", "part"), [("tpu", "there is no device 'tpu'"), ("cuda:99", "there is no device 'cuda:99'")]
)
def test_a_device_that_is_not_there_is_refused(models: Path, device: str, part: str) -> None:
    recipe_file(models, "linear", ["a", "b"])
    told = run(models, "merge", "--config", "linear.yml", "-o", "out", "--device", device, status=1).stderr
    assert part in told


def test_one_model_passed_through_is_that_model(models: Path) -> None:
    recipe_file(models, "passthrough", ["a"])
    (models / "passthrough.yml").write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": "a"}]}))
    run(models, "merge", "--config", "passthrough.yml", "-o", "out", "--shard-size", "300")
    merged, expected = tensors_of(models / "out"), tensors_of(models / "a")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


# --- what other tools read ---


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_finds_every_key_and_none_too_many(tmp_path: Path, family: str, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, vocab_size=50, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
        )
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / name, max_shard_size="9KB" if name == "b" else "1GB")
    recipe_file(tmp_path, "linear", ["a", "b"])
    run(tmp_path, "merge", "--config", "linear.yml", "-o", "out", "--shard-size", "9KB")
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("a", "b"))
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


def test_stacked_layers_load_and_say_how_many_they_are(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "a")
    parts = [{"sources": [{"model": "a", "layer_range": pair}]} for pair in ([0, 3], [1, 4])]
    (tmp_path / "stack.yml").write_text(json.dumps({"merge_method": "passthrough", "slices": parts}))
    run(tmp_path, "merge", "--config", "stack.yml", "-o", "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert model.config.num_hidden_layers == 6
    source = tensors_of(tmp_path / "a")
    merged = tensors_of(tmp_path / "out")
    for target, layer in enumerate((0, 1, 2, 1, 2, 3)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(merged[name.format(target)], source[name.format(layer)])
