"""Importing seeds from Hugging Face folders, and setting up those made from scratch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reporters import Recorder
from safetensors.torch import load_file, save_file
from tiny_families import family_folder, family_model

from expertctl import UserError, load_model, verify
from expertctl.core.artefacts.layout import Layout
from expertctl.core.config.project import load_project
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.models.generation import Sampling, generate
from expertctl.core.models.stored_names import checkpoint_tensors, stored_tensors
from expertctl.core.testing import tiny_model_folder
from expertctl.experts.runs.seed import import_seed, start_pretraining
from expertctl.workspace import Workspace


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "expertctl.yaml").write_text("")
    return Layout(tmp_path / "workspace")


def shard(folder: Path) -> None:
    """Split a folder's weights into two shards with an index, as large models are saved."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def logits(folder: Path) -> torch.Tensor:
    model, _ = load_model(folder)
    with torch.inference_mode():
        return model(torch.arange(1, 12)[None]).logits


@pytest.mark.parametrize("family", ["olmo2", "llama"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_seed_is_the_model_it_was_imported_from(
    layout: Layout, tmp_path: Path, family: str, tied: bool, sharded: bool
) -> None:
    source = tiny_model_folder(tmp_path / "model", family, tied=tied)
    before = logits(source)
    if sharded:
        shard(source)
    import_seed(layout, source)
    assert torch.equal(logits(layout.seed), before)
    assert verify(layout.seed) == []


def test_weights_are_linked_and_not_copied(layout: Layout, model_folder: Path) -> None:
    import_seed(layout, model_folder)
    assert (layout.seed / "model.safetensors").stat().st_ino == (model_folder / "model.safetensors").stat().st_ino


@pytest.mark.parametrize(("given", "expected"), [(None, "mit"), ("Apache-2.0", "Apache-2.0")])
def test_the_licence_is_the_cards_unless_given(
    layout: Layout, tmp_path: Path, given: str | None, expected: str
) -> None:
    source = tiny_model_folder(tmp_path / "model")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert import_seed(layout, source, licence=given).licence == expected


def test_the_digest_does_not_depend_on_sharding(layout: Layout, tmp_path: Path) -> None:
    whole = import_seed(layout, tiny_model_folder(tmp_path / "a")).digest
    split = tiny_model_folder(tmp_path / "b")
    shard(split)
    assert import_seed(layout, split, force=True).digest == whole


@pytest.mark.parametrize("names", ["in files", "in memory", "without a prefix"])
def test_the_names_of_a_seed_are_those_that_transformers_writes(layout: Layout, tmp_path: Path, names: str) -> None:
    """Mixtures keep one tensor for each expert in files and one for all in memory."""
    family = "gpt2" if names == "without a prefix" else "mixtral"
    source, model = family_folder(tmp_path / "model", family), family_model(family)
    tensors = {
        "in files": stored_tensors(model),
        "in memory": checkpoint_tensors(model),
        "without a prefix": {
            name.removeprefix("transformer."): tensor for name, tensor in checkpoint_tensors(model).items()
        },
    }[names]
    save_file(tensors, source / "model.safetensors")
    manifest = import_seed(layout, source)
    assert set(manifest.tensors) == set(stored_tensors(model))
    is_linked = (layout.seed / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert is_linked == (names == "in files")
    with torch.inference_mode():
        expected = model(torch.arange(1, 12)[None]).logits
    torch.testing.assert_close(logits(layout.seed), expected, atol=1e-5, rtol=0)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(layout: Layout, tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        import_seed(layout, source)
    assert not layout.seed.exists()


def test_truncated_weights_are_refused(layout: Layout, tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model")
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        import_seed(layout, source)
    assert not layout.seed.exists()


def test_a_missing_shard_is_named(layout: Layout, tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model")
    shard(source)
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors, which does not exist"):
        import_seed(layout, source)


def test_a_folder_that_is_no_model_is_refused(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        import_seed(layout, tmp_path / "empty")
    source = tiny_model_folder(tmp_path / "model")
    (source / "config.json").write_text(json.dumps({"model_type": "frobnicator"}))
    with pytest.raises(UserError, match="not a causal language model supported by transformers"):
        import_seed(layout, source)


def test_a_seed_is_not_replaced_without_force(layout: Layout, model_folder: Path) -> None:
    import_seed(layout, model_folder)
    with pytest.raises(UserError, match="exists already; use --force"):
        import_seed(layout, model_folder)


def test_a_pretrained_seed_says_what_it_was_made_of(seeded_project: Path) -> None:
    manifest = read_manifest(seeded_project / "seed")
    assert set(manifest.domains) == {"prose", "chance"}
    assert manifest.run.preset == "tiny"
    assert manifest.run.training.schedule_end == 0.5
    assert verify(seeded_project / "seed") == []


def test_the_tokenizer_of_a_seed_is_the_same_every_time(seeded_project: Path, tmp_path: Path) -> None:
    import shutil

    root = shutil.copytree(seeded_project, tmp_path / "again")
    shutil.rmtree(root / "seed")
    start_pretraining(Layout(root), load_project(root / "expertctl.yaml"))
    assert (root / "seed" / "tokenizer.json").read_bytes() == (seeded_project / "seed" / "tokenizer.json").read_bytes()


def test_going_on_with_other_settings_is_refused(project: Workspace) -> None:
    import shutil

    shutil.rmtree(project.layout.seed)
    start_pretraining(project.layout, project.config)
    path = project.layout.config_file
    path.write_text(path.read_text().replace('"tokens": 1280', '"tokens": 2560'))
    with pytest.raises(UserError, match="was started with other settings"):
        start_pretraining(project.layout, load_project(path))


def test_a_preset_too_short_for_the_blocks_is_refused(project: Workspace) -> None:
    import shutil

    shutil.rmtree(project.layout.seed)
    path = project.layout.config_file
    path.write_text(path.read_text().replace('"sequence_length": 32', '"sequence_length": 4096'))
    with pytest.raises(UserError, match="exceeds the 1024 positions of preset 'tiny'"):
        start_pretraining(project.layout, load_project(path))


def add_token(folder: Path, text: str, *, token_id: int) -> None:
    """Add a token to the tokenizer of a folder, without a row in the model."""
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"].append({"id": token_id, "content": text, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_an_added_token_without_a_row_is_reported_and_refused_where_it_occurs(layout: Layout, tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model")
    add_token(source, "<law>", token_id=300)
    said = Recorder()
    import_seed(layout, source, reporter=said)
    assert any("1 added tokens" in text and "'<law>'" in text for text in said.lines)
    domains = {}
    for name, word in (("plain", "fox"), ("law", "<law>")):
        domains[name] = {"path": str(tmp_path / f"{name}.jsonl")}
        lines = [json.dumps({"text": f"The {word} jumps over {number} dogs. " * 9}) for number in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (layout.root / "expertctl.yaml").write_text(json.dumps({"domains": domains}))
    workspace = Workspace(layout.root)
    workspace.prepare(["plain"])
    with pytest.raises(UserError, match="token '<law>' has the id 300, but the model's embedding has only 300 rows"):
        workspace.prepare(["law"])
    assert generate(layout.seed, "The fox", Sampling(max_new_tokens=2)).text is not None
    with pytest.raises(UserError, match="token '<law>' has the id 300"):
        generate(layout.seed, "The <law>", Sampling(max_new_tokens=2))


def test_the_tokenizer_of_a_larger_model_is_refused(layout: Layout, tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model")
    settings = json.loads((source / "config.json").read_text()) | {"vocab_size": 290}
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:290].contiguous()
    (source / "config.json").write_text(json.dumps(settings))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has the id 299, but the model's embedding has only 290 rows"):
        import_seed(layout, source)
    assert not layout.seed.exists()


def test_tensors_of_other_shapes_than_described_are_refused(layout: Layout, tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model")
    settings = json.loads((source / "config.json").read_text()) | {"intermediate_size": 32}
    (source / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"mlp.* is \[24, 16\], but .*config.json describes \[32, 16\]"):
        import_seed(layout, source)
    assert not layout.seed.exists()


def test_layers_that_the_configuration_does_not_describe_are_left_out_and_named(layout: Layout, tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model", "llama")
    settings = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    (source / "config.json").write_text(json.dumps(settings))
    said = Recorder()
    import_seed(layout, source, reporter=said)
    assert any("left out 9 tensors" in text and "model.layers.1." in text for text in said.lines)
    assert not any(".layers.1." in name for name in read_manifest(layout.seed).tensors)


def test_every_written_configuration_names_its_class(layout: Layout, tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model", "llama")
    settings = json.loads((source / "config.json").read_text())
    del settings["architectures"]
    (source / "config.json").write_text(json.dumps(settings))
    import_seed(layout, source)
    assert json.loads((layout.seed / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    (tmp_path / "text.txt").write_text("The fox jumps over the dog.\n\n" * 30 + "Another one.\n\n")
    (layout.root / "expertctl.yaml").write_text(json.dumps({"domains": {"a": {"path": str(tmp_path / "text.txt")}}}))
    start_pretraining(layout, load_project(layout.root / "expertctl.yaml"), force=True)
    assert json.loads((layout.seed / "config.json").read_text())["architectures"] == ["Olmo2ForCausalLM"]
