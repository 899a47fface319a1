"""Manifests and digests: what was written is read back, and no change of an artefact goes unnoticed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from expertctl.core.artefacts.digests import digest_of_tensors, digest_of_tokenizer, digests_of_folder
from expertctl.core.artefacts.safetensors_io import Checkpoint, tensor_digest, write_tensors
from expertctl.core.artefacts.versions import package_version, tool_versions
from expertctl.core.errors import UserError
from expertctl.core.manifests.manifest import ImportedSeed, Manifest, Parent, manifest_path, read_manifest
from expertctl.core.manifests.statements import DataStatement, DomainStatement
from expertctl.core.manifests.verification import require_intact, verify


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    """A seed folder with a file of every kind: weights, optimiser state, JSON, text, something in a sub-folder."""
    folder = tmp_path / "seed"
    (folder / "training").mkdir(parents=True)
    write_tensors(folder / "model.safetensors", {"a": torch.arange(4.0), "b": torch.ones(2, 2).bfloat16()})
    write_tensors(folder / "training" / "optimiser.safetensors", {"a": torch.arange(3.0)})
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    (folder / "tokenizer.json").write_text('{"größe": 1}\n', encoding="utf-8")
    (folder / "empty.txt").write_bytes(b"")
    finish(folder)
    return folder


def finish(folder: Path) -> Manifest:
    tensors, files = digests_of_folder(folder)
    manifest = Manifest(
        kind="seed",
        name="seed",
        digest=digest_of_tensors(tensors),
        tensors=tensors,
        files=files,
        tokenizer=digest_of_tokenizer(folder),
        parents=(Parent("expert", "a", "0" * 64, 0.25), Parent("expert", "b", "1" * 64)),
        config=ImportedSeed("llama"),
        data=DataStatement({"law": DomainStatement(tokens=12)}),
        metrics={"loss": 0.5},
        trainable="all",
        owner="Bibliothèque",
        licence="CC0-1.0",
        versions=tool_versions(),
    )
    manifest.write(folder)
    return manifest


# --- manifests ---


def test_a_manifest_is_read_back_as_it_was_written(artefact: Path) -> None:
    manifest = finish(artefact)
    assert read_manifest(artefact) == manifest
    assert manifest_path(artefact) == artefact / "seed.json"


def test_the_same_artefact_gives_the_same_manifest_bytes(artefact: Path) -> None:
    """No time, no path, no order of a set in it."""
    before = (artefact / "seed.json").read_bytes()
    finish(artefact)
    assert (artefact / "seed.json").read_bytes() == before
    assert str(artefact).encode() not in before


def test_a_folder_without_a_manifest_is_no_finished_artefact(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a finished artefact"):
        read_manifest(tmp_path)


def test_a_manifest_of_a_later_format_is_refused(artefact: Path) -> None:
    path = artefact / "seed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(UserError, match=r"has format 3; this version reads format 2"):
        read_manifest(artefact)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 2}', '{"format": 2, "parents": [1]}', '{"format": 2, "extra": 1}']
)
def test_a_damaged_manifest_is_named(artefact: Path, content: str) -> None:
    (artefact / "seed.json").write_text(content)
    with pytest.raises(UserError, match=r"seed\.json"):
        read_manifest(artefact)


# --- digests ---


def test_a_checkpoint_digest_does_not_depend_on_sharding_or_order(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3) for name in "cab"}
    write_tensors(tmp_path / "one.safetensors", tensors)
    write_tensors(tmp_path / "x.safetensors", {"c": tensors["c"]})
    write_tensors(tmp_path / "y.safetensors", {"a": tensors["a"], "b": tensors["b"]})
    whole = Checkpoint([tmp_path / "one.safetensors"]).digests()
    parts = Checkpoint([tmp_path / "x.safetensors", tmp_path / "y.safetensors"]).digests()
    in_memory = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    assert digest_of_tensors(whole) == digest_of_tensors(parts) == digest_of_tensors(in_memory)
    swapped = in_memory | {"a": in_memory["b"], "b": in_memory["a"]}
    assert digest_of_tensors(swapped) != digest_of_tensors(whole)


def test_a_checkpoint_digest_covers_names() -> None:
    digest = tensor_digest(torch.ones(2))
    assert digest_of_tensors({"a": digest}) != digest_of_tensors({"b": digest})


def test_optimiser_state_does_not_count_in_the_digest_but_is_checked(artefact: Path) -> None:
    manifest = read_manifest(artefact)
    weights_only = {name: digest for name, digest in manifest.tensors.items() if "/" not in name}
    assert set(weights_only) == {"a", "b"}
    assert digest_of_tensors(weights_only) == manifest.digest
    assert "training/optimiser/a" in manifest.tensors


def test_a_tokenizer_digest_looks_at_tokenizer_files_only(artefact: Path) -> None:
    before = digest_of_tokenizer(artefact)
    (artefact / "config.json").write_text("{}")
    assert digest_of_tokenizer(artefact) == before
    (artefact / "tokenizer_config.json").write_text("{}")
    assert digest_of_tokenizer(artefact) != before


def test_versions_name_the_packages_that_can_change_a_result() -> None:
    assert set(tool_versions()) == {"expertctl", "torch", "transformers", "tokenizers", "safetensors"}
    assert tool_versions()["torch"] == torch.__version__
    assert package_version("no-such-distribution") == "not installed"


# --- verify ---


def test_an_artefact_as_written_is_intact(artefact: Path) -> None:
    assert verify(artefact) == []
    assert require_intact(artefact) == read_manifest(artefact)


def test_every_flipped_bit_in_every_file_is_found(artefact: Path) -> None:
    """One bit of every byte, safetensors' headers included; of every fourth in the long manifest."""
    source = random.Random(0)
    flipped = 0
    for path in [path for path in artefact.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for index in range(0, len(content), 4 if path.name == "seed.json" else 1):
            changed = bytearray(content)
            changed[index] ^= 1 << source.randrange(8)
            path.write_bytes(changed)
            assert found_changed(artefact), f"{path.name} byte {index}: {content[index]} -> {changed[index]}"
            flipped += 1
        path.write_bytes(content)
    assert flipped > 700
    assert verify(artefact) == []


def found_changed(folder: Path) -> bool:
    """Tell whether verify finds anything; a manifest that cannot be read at all is an error of its own."""
    try:
        return bool(verify(folder))
    except UserError:
        return True


def test_changed_files_are_named(artefact: Path) -> None:
    weights = Checkpoint([artefact / "model.safetensors"])
    tensors = {name: weights.read(name) for name in weights}
    write_tensors(artefact / "model.safetensors", tensors | {"b": torch.zeros(2, 2).bfloat16()})
    assert verify(artefact) == ["tensor b was changed"]
    with pytest.raises(UserError, match="is not what its manifest says: tensor b was changed; restore or remake"):
        require_intact(artefact)


def test_an_added_a_missing_and_a_changed_file_are_named(artefact: Path) -> None:
    (artefact / "training" / "added.bin").write_bytes(b"x")
    (artefact / "config.json").unlink()
    (artefact / "empty.txt").write_text("no longer")
    assert verify(artefact) == [
        "file config.json is missing",
        "file empty.txt was changed",
        "file training/added.bin was added",
    ]
    with pytest.raises(UserError, match=r"config\.json is missing \(and 2 more\)"):
        require_intact(artefact)


def test_a_tensor_that_was_removed_or_added_is_named(artefact: Path) -> None:
    write_tensors(artefact / "model.safetensors", {"a": torch.arange(4.0), "c": torch.ones(1)})
    assert verify(artefact) == [
        "file model.safetensors was changed",
        "tensor c was changed",
        "tensor b is missing",
    ]


def test_truncated_weights_are_named(artefact: Path) -> None:
    path = artefact / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert any("model.safetensors is damaged" in line for line in verify(artefact))


def test_a_changed_manifest_is_noticed_even_where_only_spaces_moved(artefact: Path) -> None:
    path = artefact / "seed.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"owner": ', '"owner":  '), encoding="utf-8")
    assert verify(artefact) == ["seed.json itself was changed"]


def test_logs_and_hidden_state_are_no_part_of_an_artefact(artefact: Path) -> None:
    (artefact / "metrics.jsonl").write_text("{}\n")
    (artefact / "training.log").write_text("a warning\n")
    (artefact / ".training").mkdir()
    (artefact / ".training" / "state.json").write_text("{}")
    assert verify(artefact) == []


def test_files_that_are_links_count_by_what_they_hold(artefact: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    (artefact / "config.json").rename(elsewhere)
    (artefact / "config.json").symlink_to(elsewhere)
    assert verify(artefact) == []
    elsewhere.write_text("{}")
    assert verify(artefact) == ["file config.json was changed"]
