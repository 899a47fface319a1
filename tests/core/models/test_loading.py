"""Loading any artefact as a transformers model, and refusing what is not finished, whole, or related."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import expertctl
from expertctl.core.artefacts.safetensors_io import Checkpoint
from expertctl.core.errors import UserError
from expertctl.core.models.loading import ExpertTensors, check_loadable, overlay_tensors, tokenizer_folder
from expertctl.core.testing import tiny_model_folder


@pytest.mark.parametrize("family", ["olmo2", "llama", "qwen3"])
def test_a_plain_folder_loads_as_transformers_loads_it(tmp_path: Path, family: str) -> None:
    folder = tiny_model_folder(tmp_path / family, family)
    model, tokenizer = expertctl.load_model(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert not model.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.decode(tokenizer("the lazy dog")["input_ids"]) == "the lazy dog"


def test_output_of_an_unfinished_job_is_refused_even_if_it_is_complete(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / ".merged.unfinished", "llama")
    with pytest.raises(UserError, match="is the output of an unfinished job"):
        expertctl.load_model(folder)


def test_an_expert_is_the_seed_with_its_own_tensors_laid_over(shared_workspace: Path) -> None:
    model, tokenizer = expertctl.load_model(shared_workspace / "experts" / "law")
    seed = load_file(shared_workspace / "seed" / "model.safetensors")
    own = load_file(shared_workspace / "experts" / "law" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, own.get(name, seed[name]))
    assert len(tokenizer) == 300


def test_an_expert_of_a_tied_model_changes_both_embeddings(new_workspace: Any, tmp_path: Path) -> None:
    workspace = new_workspace(tmp_path / "ws", ("law",), family="llama", tied=True)
    model, _ = expertctl.load_model(workspace / "experts" / "law")
    own = load_file(workspace / "experts" / "law" / "model.safetensors")
    assert "lm_head.weight" not in own
    assert torch.equal(model.lm_head.weight, own["model.embed_tokens.weight"])


def test_a_dtype_may_be_asked_for(shared_workspace: Path, new_workspace: Any, tmp_path: Path) -> None:
    model, _ = expertctl.load_model(shared_workspace / "experts" / "law", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    stored = new_workspace(tmp_path / "ws", ("law",), dtype="bfloat16")
    assert expertctl.load_model(stored / "experts" / "law")[0].dtype == torch.bfloat16
    assert expertctl.load_model(stored / "experts" / "law", dtype="float32")[0].dtype == torch.float32


def test_an_unknown_dtype_is_a_users_error(shared_workspace: Path) -> None:
    with pytest.raises(UserError, match=r"no dtype 'flaot32' \(did you mean 'float32'\?\); known: auto, bfloat16"):
        expertctl.load_model(shared_workspace / "seed", dtype="flaot32")


# --- seeds of experts ---


def test_an_expert_elsewhere_needs_its_seed_named(shared_workspace: Path, tmp_path: Path) -> None:
    away = tmp_path / "law"
    shutil.copytree(shared_workspace / "experts" / "law", away)
    with pytest.raises(UserError, match=r"no expertctl\.yaml"):
        expertctl.load_model(away)
    model, _ = expertctl.load_model(away, seed=shared_workspace / "seed")
    home, _ = expertctl.load_model(shared_workspace / "experts" / "law")
    tokens = torch.tensor([[4, 5, 6]])
    assert torch.equal(model(tokens).logits, home(tokens).logits)
    assert tokenizer_folder(away, shared_workspace / "seed") == shared_workspace / "seed"


def test_an_expert_of_another_seed_is_refused(shared_workspace: Path, new_workspace: Any, tmp_path: Path) -> None:
    other = new_workspace(tmp_path / "ws", (), seed=5)
    with pytest.raises(UserError, match=r"expert 'law' was branched from seed [0-9a-f]{12}, but .* is [0-9a-f]{12}"):
        expertctl.load_model(shared_workspace / "experts" / "law", seed=other / "seed")
    with pytest.raises(UserError, match=r"needs its seed, and .* is not a seed folder; pass the seed with seed="):
        expertctl.load_model(shared_workspace / "experts" / "law", seed=tmp_path)


# --- folders that are not whole ---


def test_an_unfinished_expert_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json: it is not a model folder, or it is unfinished"):
        expertctl.load_model(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"is an unfinished run: it has a run\.json and no manifest"):
        expertctl.load_model(tmp_path)


def test_a_seed_whose_manifest_is_not_there_yet_is_refused(model_folder: Path, tmp_path: Path) -> None:
    """Weights are written before the manifest, and a process may die between the two."""
    folder = tmp_path / "seed"
    shutil.copytree(model_folder, folder)
    (folder / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"seed is an unfinished run: it has a run\.json and no manifest"):
        expertctl.load_model(folder)


def test_no_folder_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        expertctl.load_model(tmp_path / "nothing")


def test_truncated_weights_are_refused_before_anything_is_loaded(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        expertctl.load_model(folder)


def test_pickled_weights_are_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    shutil.copy(model_folder / "config.json", folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights"):
        check_loadable(folder)


def test_a_tensor_that_is_missing_is_named_and_not_made_up(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"x has no tensor 'model\.norm\.weight'"):
        expertctl.load_model(folder)


def test_a_folder_without_a_tokenizer_is_a_users_error(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(model_folder, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="has no loadable tokenizer") as caught:
        expertctl.load_model(folder)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_type_is_a_user_error(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llamma", "architectures": ["X"]}))
    with pytest.raises(UserError, match="llamma") as caught:
        expertctl.load_model(folder)
    assert "\n" not in str(caught.value)


# --- tensors of experts ---


def test_expert_tensors_are_the_experts_where_it_has_them(new_workspace: Any, tmp_path: Path) -> None:
    workspace = new_workspace(tmp_path / "ws", ("law",), changed="model.layers.0.mlp.*")
    seed = Checkpoint.of_folder(workspace / "seed")
    tensors = ExpertTensors(seed, workspace / "experts" / "law")
    own = load_file(workspace / "experts" / "law" / "model.safetensors")
    base = load_file(workspace / "seed" / "model.safetensors")
    assert set(tensors) == set(base)
    for name in tensors:
        assert torch.equal(tensors.read(name), own.get(name, base[name]))
        assert tensors.entry(name).file.parent.name == ("law" if name in own else "seed")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(3), r"'model\.norm\.weight' is F32 \[3\] in .*law, but F32 \[16\] in the seed"),
        (torch.ones(16).half(), r"is F16 \[16\] in .*, but F32 \[16\] in the seed"),
    ],
    ids=["shape", "dtype"],
)
def test_tensors_that_do_not_fit_the_seed_are_refused(
    shared_workspace: Path, tmp_path: Path, tensor: torch.Tensor, said: str
) -> None:
    (tmp_path / "law").mkdir()
    save_file({"model.norm.weight": tensor}, tmp_path / "law" / "model.safetensors")
    with pytest.raises(UserError, match=said):
        ExpertTensors(Checkpoint.of_folder(shared_workspace / "seed"), tmp_path / "law")


def test_a_tensor_that_the_model_does_not_have_is_refused(model_folder: Path) -> None:
    model, _ = expertctl.load_model(model_folder)
    with pytest.raises(UserError, match=r"the model has no tensor 'other\.weight'"):
        overlay_tensors(model, {"other.weight": torch.ones(1)})


@pytest.mark.parametrize("shown", [True, False])
def test_loading_shows_no_bar_and_leaves_the_users_setting_as_it_was(
    shared_workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], shown: bool
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setattr(logging, "_tqdm_active", shown)
    expertctl.load_model(shared_workspace / "experts" / "law")
    assert logging.is_progress_bar_enabled() is shown
    with pytest.raises(UserError):
        expertctl.load_model(shared_workspace)
    assert logging.is_progress_bar_enabled() is shown
    assert capfd.readouterr().err == ""


def test_loading_bars_are_shown_on_request(
    shared_workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    monkeypatch.setattr(logging, "_tqdm_active", True)
    expertctl.load_model(shared_workspace / "seed")
    assert "Loading weights" in capfd.readouterr().err


def test_classes_can_be_registered_twice() -> None:
    expertctl.register_auto_classes()
    expertctl.register_auto_classes()
