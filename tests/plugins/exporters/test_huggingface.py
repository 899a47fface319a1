"""Exported Hugging Face folders, loaded by transformers alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from expertctl import UserError, load_model
from expertctl.core.artefacts.digests import digest_of_tensors, digests_of_folder
from expertctl.core.artefacts.files import read_json, write_json
from expertctl.core.artefacts.licence_card import card_metadata
from expertctl.core.manifests.manifest import Manifest, Parent, read_manifest
from expertctl.core.testing import tiny_model_folder
from expertctl.merge.generalists.exporting import export_model
from expertctl.merge.generalists.hub_check import missing_for_hub
from expertctl.workspace import Workspace

TOKENS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))

DOUBLE: dict[str, Any] = {"dtype": torch.float64, "experts_implementation": "eager"}
"""How transformers computes in float64: its kernels for experts do not."""


def logits(folder: Path) -> torch.Tensor:
    """Return the logits of the model in a folder, loaded by transformers, which must miss and ignore no tensor."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, **DOUBLE, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(TOKENS).logits


# A mixture's gates are float32 in any dtype, so that its experts' order of summation shows in float64 too.
TOLERANCE = {"mixture": 1e-5}


def own_logits(folder: Path) -> torch.Tensor:
    model, _ = load_model(folder, dtype="float64")
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, new_workspace: Any) -> Workspace:
    """A workspace of Llamas with generalists of every kind. Only read it."""
    root = new_workspace(
        tmp_path_factory.mktemp("exports") / "ws", ("code", "law"), family="llama", changed="model.layers.*.mlp.*"
    )
    made = Workspace(root)
    made.merge("mean", method="linear")
    made.merge("forest", method="ensemble", options={"prior": "uniform"})
    made.merge("mixture", method="mixture", options={"router": "random"})
    made.merge("container", method="mixture", options={"router": "random", "target": "container"})
    return made


@pytest.mark.parametrize("name", ["seed", "code", "mean", "mixture"])
def test_transformers_computes_what_load_model_does(workspace: Workspace, name: str, tmp_path: Path) -> None:
    done = workspace.export(name, "safetensors", tmp_path / "out", {"shard_size": "20KB"})
    torch.testing.assert_close(
        logits(tmp_path / "out"), own_logits(workspace.layout.artefact(name)), rtol=0, atol=TOLERANCE.get(name, 1e-6)
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b").input_ids
    assert done.files.keys() >= {"config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"}
    assert not any((tmp_path / "out").glob("*.bin"))
    # what vLLM reads before the weights
    config, index = (read_json(tmp_path / "out" / file) for file in ("config.json", "model.safetensors.index.json"))
    assert config["architectures"] == ["MixtralForCausalLM" if name == "mixture" else "LlamaForCausalLM"]
    stored = {tensor: file.name for file in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(file)}
    assert index["weight_map"] == stored
    assert max(done.files[file] for file in set(stored.values())) < 30_000


def test_a_mixtures_experts_are_separate_or_fused_for_transformers_own_class(
    workspace: Workspace, tmp_path: Path
) -> None:
    for layout in ("per_expert", "fused"):
        workspace.export("mixture", "safetensors", tmp_path / layout, {"experts": layout})
    expected = logits(workspace.generalists / "mixture")
    for layout in ("per_expert", "fused"):
        model = MixtralForCausalLM.from_pretrained(tmp_path / layout, **DOUBLE)
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, expected)
    separate, fused = (load_file(tmp_path / layout / "model.safetensors") for layout in ("per_expert", "fused"))
    prefix = "model.layers.1.block_sparse_moe.experts."
    assert {f"{prefix}{expert}.w{part}.weight" for expert in (0, 1) for part in (1, 2, 3)} <= separate.keys()
    both = fused["model.layers.1.mlp.experts.gate_up_proj"]
    parts = [torch.cat([separate[f"{prefix}{e}.w1.weight"], separate[f"{prefix}{e}.w3.weight"]]) for e in (0, 1)]
    assert torch.equal(both, torch.stack(parts))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "olmo2"])
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_a_fused_export_exported_again_is_the_same_model(family: str, layout: str, tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model", family, dtype="bfloat16")
    export_model(model, "safetensors", tmp_path / "fused", {"experts": "fused"})
    export_model(tmp_path / "fused", "safetensors", tmp_path / "again", {"experts": layout})
    expected = load_file(tmp_path / "fused" / "model.safetensors") if layout == "fused" else None
    expected = expected or load_file(model / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_lora_expert_is_exported_applied(tmp_path: Path, new_workspace: Any) -> None:
    peft = pytest.importorskip("peft")
    root = new_workspace(tmp_path / "ws", (), family="llama", dtype="bfloat16")
    seed, folder = read_manifest(root / "seed"), root / "experts" / "poems"
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(root / "seed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(folder)
    (folder / "README.md").unlink()
    settings = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", settings | {"base_model_name_or_path": "seed"})
    tensors, files = digests_of_folder(folder)
    Manifest(
        "expert",
        "poems",
        digest_of_tensors(tensors),
        tensors,
        files,
        seed.tokenizer,
        (Parent("seed", "seed", seed.digest, 1.0),),
        trainable="lora",
    ).write(folder)
    Workspace(root).export("poems", "dense", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(root / "seed" / "model.safetensors")
    changed = {name for name in stored if not torch.equal(stored[name], original[name])}
    assert changed == {name for name in stored if name.endswith(("q_proj.weight", "up_proj.weight"))}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = load_model(folder)[0].float()
    with torch.no_grad():
        torch.testing.assert_close(exported(TOKENS).logits, expected(TOKENS).logits, rtol=0, atol=1e-6)


def test_the_card_says_what_it_is_and_what_the_hub_would_miss(workspace: Workspace, tmp_path: Path) -> None:
    done = workspace.export("code", "dense", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert read_manifest(workspace.layout.artefact("code")).digest in text
    assert "AutoModelForCausalLM" in text
    assert "expertctl.load_model" not in text
    (note,) = done.notes
    assert "language" in note
    assert "OWNER/NAME of the base model 'seed'" in note
    assert "licence" not in note
    card = tmp_path / "out" / "README.md"
    complete = {"language": ["en"], "base_model": ["me/seed"]}
    card.write_text(f"---\n{json.dumps({**(card_metadata(tmp_path / 'out') or {}), **complete})}\n---\n")
    assert missing_for_hub(tmp_path / "out") == []
    (tmp_path / "out" / "optimizer.pt").touch()
    (tmp_path / "out" / "tokenizer.json").unlink()
    write_json(tmp_path / "out" / "config.json", {})
    assert missing_for_hub(tmp_path / "out") == [
        "architectures in config.json",
        "a tokenizer",
        "optimizer.pt as safetensors: it is pickled",
    ]


@pytest.mark.parametrize(
    ("name", "to", "reason"),
    [
        ("forest", "safetensors", "objective 'distil'"),
        ("forest", "dense", "objective 'distil'"),
        ("container", "safetensors", "objective 'distil'"),
        ("mixture", "dense", "--to safetensors"),
        ("seed", "safetensor", "did you mean 'safetensors'"),
        ("nobody", "safetensors", "nobody"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    workspace: Workspace, name: str, to: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        workspace.export(name, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"shard_size": "big"}, "shard_size"), ({"expert": "fused"}, "experts"), ({"experts": "none"}, "experts")],
)
def test_bad_options_are_refused(workspace: Workspace, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        workspace.export("seed", "safetensors", tmp_path / "out", options)


def test_an_output_is_replaced_only_with_force_and_only_if_it_is_an_export(
    workspace: Workspace, tmp_path: Path
) -> None:
    workspace.export("code", "safetensors", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--force"):
        workspace.export("law", "safetensors", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    workspace.export("law", "safetensors", tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    seed = workspace.layout.seed
    for place, reason in (
        (seed / "out", "in the folder of the model"),
        (seed, "in the folder of the model"),
        (workspace.root, "contains the model"),
        (workspace.generalists / "mean", "generalist.json"),
    ):
        with pytest.raises(UserError, match=reason):
            workspace.export("code" if place.name == "out" else "seed", "safetensors", place, force=True)
    assert not (seed / "out").exists()


def test_damaged_and_unfinished_models_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    root = shutil.copytree(workspace.root, tmp_path / "ws")
    weights = root / "seed" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()  # it may be a link
    weights.write_bytes(content)
    for name in ("seed", "code"):
        with pytest.raises(UserError, match="not what its manifest says"):
            Workspace(root).export(name, "safetensors", tmp_path / "out")
    (root / "experts" / "law" / "expert.json").rename(root / "experts" / "law" / "run.json")
    with pytest.raises(UserError, match="not finished"):
        export_model(root / "experts" / "law", "safetensors", tmp_path / "out")
    (root / "expertctl.yaml").unlink()
    with pytest.raises(UserError, match=r"expertctl\.yaml"):
        export_model(root / "experts" / "code", "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expertctl.core.artefacts import files

    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(UserError, match="free some space"):
        workspace.export("seed", "safetensors", tmp_path / "out")
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, time
from expertctl.core.artefacts import safetensors_io
from expertctl.merge.generalists.exporting import export_model

add = safetensors_io.FileWriter.add

def slow(self, name, piece):
    add(self, name, piece)
    print(name, flush=True)
    time.sleep(60)

safetensors_io.FileWriter.add = slow
export_model(__import__("pathlib").Path(sys.argv[1]), "safetensors", __import__("pathlib").Path(sys.argv[2]))
"""


def test_a_killed_export_leaves_no_folder_of_its_name(workspace: Workspace, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", KILLED, str(workspace.layout.seed), str(output)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not output.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    started = time.monotonic()
    workspace.export("seed", "safetensors", output)
    assert time.monotonic() - started < 30
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert logits(output).isfinite().all()


def test_a_plain_folder_keeps_its_card_and_gets_the_name_of_its_class(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model", "qwen3")
    (model / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    config = read_json(model / "config.json")
    del config["architectures"]
    write_json(model / "config.json", config)
    export_model(model, "dense", tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["architectures"] == ["Qwen3ForCausalLM"]
    assert (tmp_path / "out" / "README.md").read_text() == "---\nlicense: mit\n---\nMine.\n"
    assert torch.equal(logits(tmp_path / "out"), logits(model))


def test_an_expert_trained_inside_a_larger_model_is_no_model_of_its_own(
    flexolmo_workspace: Workspace, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="'flexolmo' as a part of a larger model"):
        flexolmo_workspace.export("prose", "dense", tmp_path / "out")
    flexolmo_workspace.merge("exported", method="flexolmo")
    flexolmo_workspace.export("exported", "safetensors", tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(flexolmo_workspace.generalists / "exported"))
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="'flex_olmo', which exporter 'gguf' does not map"):
        flexolmo_workspace.export("exported", "gguf", tmp_path / "out.gguf")
