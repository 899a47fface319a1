"""Several merges that take results of each other as inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_models import random_tensors, tensors_of, write_model

from expertctl.core.errors import UserError
from expertctl.core.manifests.manifest import read_manifest
from expertctl.merge.merging import MergeRun
from expertctl.merge.recipes.mergekit_documents import Stage, read_stages
from expertctl.merge.remaking.reproducing import reproduce
from expertctl.merge.remaking.stages import merge_stages

TEXT = """\
merge_method: linear
models:
- {model: pair, parameters: {weight: 3}}
- {model: c, parameters: {weight: 1}}
---
name: pair
merge_method: linear
models:
- {model: a, parameters: {weight: 1}}
- {model: b, parameters: {weight: 1}}
"""


@pytest.fixture
def stages(tmp_path: Path) -> tuple[Stage, ...]:
    base = random_tensors(0)
    for seed, name in enumerate("abc"):
        noise = torch.Generator().manual_seed(seed)
        changed = {key: tensor + 0.1 * torch.randn(tensor.shape, generator=noise) for key, tensor in base.items()}
        write_model(tmp_path / name, changed)
    return read(tmp_path, TEXT)


def read(folder: Path, text: str) -> tuple[Stage, ...]:
    (folder / "multi.yml").write_text(text)
    return read_stages(folder / "multi.yml", folder / "out")


def test_each_result_is_a_generalist_that_can_be_reproduced(stages: tuple[Stage, ...], tmp_path: Path) -> None:
    manifests = merge_stages(stages, MergeRun())
    assert [manifest.name for manifest in manifests] == ["pair", "final"]
    a, b, c = (tensors_of(tmp_path / name) for name in "abc")
    for name, tensor in tensors_of(tmp_path / "out" / "final").items():
        torch.testing.assert_close(tensor, 0.75 * (a[name] + b[name]) / 2 + 0.25 * c[name])
    assert manifests[1].parents[0].digest == manifests[0].digest
    assert reproduce(manifests[0], tmp_path / "out" / "pair", models={n: tmp_path / n for n in "ab"}).same
    assert reproduce(manifests[1], tmp_path / "out" / "final", models={"c": tmp_path / "c"}).same


def test_resuming_keeps_finished_results_of_the_same_recipe(stages: tuple[Stage, ...], tmp_path: Path) -> None:
    merge_stages(stages[:1], MergeRun())
    before = (tmp_path / "out" / "pair" / "model.safetensors").stat()
    with pytest.raises(UserError, match="exists already"):
        merge_stages(stages, MergeRun())
    merge_stages(stages, MergeRun(resume=True))
    assert (tmp_path / "out" / "pair" / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    changed = read(tmp_path, TEXT.replace("{weight: 1}}\n- {model: b", "{weight: 2}}\n- {model: b"))
    with pytest.raises(UserError, match=r"multi.yml:6: .*pair has the result of another recipe"):
        merge_stages(changed, MergeRun(resume=True))
    merge_stages(changed, MergeRun(force=True))
    assert read_manifest(tmp_path / "out" / "pair").merged.weights == {"a": 2.0, "b": 1.0}


def test_mistakes_in_any_document_that_can_be_checked_are_found_before_the_first_merge(
    stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    wider = random_tensors(0, width=8)
    write_model(tmp_path / "wide", wider)
    other = "---\nname: other\nmerge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: wide, parameters: {weight: 1}}]\n"
    with pytest.raises(UserError, match=r"wide"):
        merge_stages(read(tmp_path, TEXT + other), MergeRun())
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "final").mkdir(parents=True)
    with pytest.raises(UserError, match=r"final exists already"):
        merge_stages(stages, MergeRun())
    assert not (tmp_path / "out" / "pair").exists()
