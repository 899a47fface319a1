"""Models that a mergekit file names: folders, models in the Hugging Face cache, and how a repetition finds them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_caches import COMMIT, cache_model
from toy_models import random_tensors, write_model

from expertctl.core.errors import UserError
from expertctl.merge.merging import merge_recipe
from expertctl.merge.recipes.mergekit_file import read_mergekit
from expertctl.merge.recipes.recipe import Recipe
from expertctl.merge.remaking.reproducing import reproduce

OTHER_COMMIT = COMMIT[::-1]
Read = Callable[..., Recipe]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads a linear merge of models; `work` is the current folder and has the file, the cache is beside it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(*models: Any) -> Recipe:
        content = {
            "merge_method": "linear",
            "models": [{"model": model} for model in models],
            "parameters": {"weight": 1},
        }
        Path("recipe.yml").write_text(yaml.safe_dump(content))
        return read_mergekit(Path("recipe.yml"))

    return call


def test_a_model_in_the_cache_is_named_and_recorded_with_its_commit(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = {
        name: cache_model(monkeypatch, write_model(tmp_path / name.replace("/", "-"), random_tensors(number)), name)
        for number, name in enumerate(("org/model", "lab/model"))
    }
    recipe = read("org/model", "lab/model@main")
    assert recipe.models == {"model": snapshots["org/model"], "lab-model": snapshots["lab/model"]}
    assert recipe.references == {"model": f"org/model@{COMMIT}", "lab-model": f"lab/model@{COMMIT}"}


@pytest.mark.parametrize(
    "reference",
    ["org/model@v2", {"path": "org/model", "revision": "v2"}, {"model": {"path": "org/model", "revision": "v2"}}],
)
def test_a_revision_is_looked_up(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Any) -> None:
    folder = write_model(tmp_path / "model", random_tensors(0))
    cache_model(monkeypatch, folder, "org/model")
    with pytest.raises(UserError, match=r"recipe.yml:3: .* hf download org/model --revision v2$"):
        read(reference)
    newer = cache_model(monkeypatch, folder, "org/model", OTHER_COMMIT, refs=("v2",))
    assert read(reference).models == {"model": newer}


def test_the_same_model_in_two_revisions_has_two_names(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "model", random_tensors(0))
    cache_model(monkeypatch, folder, "org/model")
    cache_model(monkeypatch, folder, "org/model", OTHER_COMMIT, refs=("v2",))
    recipe = read("org/model", "org/model@v2")
    assert list(recipe.models) == ["model", "org-model"]


def test_a_folder_has_precedence_over_the_cache(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_model(monkeypatch, write_model(tmp_path / "model", random_tensors(0)), "org/model")
    write_model(Path("org/model"), random_tensors(1))
    recipe = read("org/model")
    assert recipe.models == {"model": tmp_path / "work" / "org" / "model"}
    assert recipe.references == {"model": "org/model"}


def test_a_merge_of_cached_models_is_reproduced_from_the_cache(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit of the merge is used, even when the branch has moved on and another model has the name."""
    first = write_model(tmp_path / "first", random_tensors(0))
    cache_model(monkeypatch, first, "org/model")
    write_model(Path("local"), random_tensors(0))
    manifest = merge_recipe(read("org/model", "local"), Path("out"))
    cache_model(monkeypatch, write_model(tmp_path / "second", random_tensors(5)), "org/model", OTHER_COMMIT)
    write_model(Path("model"), random_tensors(6))
    assert reproduce(manifest, Path("out")).same
    shutil.rmtree("model")
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(UserError) as caught:
        reproduce(manifest, Path("out"))
    assert str(caught.value) == (
        f"model 'model' was not found; download it with `hf download org/model --revision {COMMIT}`, or give its folder: "
        "--model model=DIR"
    )
    assert reproduce(manifest, Path("out"), models={"model": first}).same


def test_models_in_subfolders_are_found_again(read: Read) -> None:
    for name in ("org/a", "org/b"):
        write_model(Path(name), random_tensors(0))
    manifest = merge_recipe(read("org/a", "org/b"), Path("results/out"))
    assert manifest.merged is not None
    assert (manifest.merged.recipe or {})["references"] == {"a": "org/a", "b": "org/b"}
    assert reproduce(manifest, Path("results/out")).same


def test_absolute_paths_are_not_recorded(read: Read, tmp_path: Path) -> None:
    write_model(tmp_path / "private" / "a", random_tensors(0))
    manifest = merge_recipe(read(str(tmp_path / "private" / "a")), Path("out"))
    assert manifest.merged is not None
    assert str(tmp_path) not in str(manifest.merged.recipe)


def test_the_base_of_an_adapter_is_found_again(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_model(monkeypatch, write_model(tmp_path / "base", random_tensors(0)), "org/base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    cache_model(monkeypatch, adapter, "org/adapter")
    recipe = read("org/base+org/adapter")
    assert list(recipe.models) == ["adapter"]
    assert recipe.references == {
        "adapter": f"org/adapter@{COMMIT}",
        "base of adapter": f"org/base@{COMMIT}",
    }
