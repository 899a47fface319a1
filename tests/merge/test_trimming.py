"""TIES with thresholds of whole models, and what it says about elements of the same magnitude."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from made_experts import write_tensors_as_expert
from numpy.typing import NDArray
from reporters import Recorder

from expertctl import UserError
from expertctl.core.artefacts.digests import digest_of_tensors, digests_of_folder
from expertctl.core.artefacts.safetensors_io import Checkpoint, tensor_bytes
from expertctl.core.manifests.manifest import read_manifest
from expertctl.merge.engine.calculator import EngineSettings
from expertctl.merge.merging import MergeRun
from expertctl.merge.planning import search as search_module
from expertctl.workspace import Workspace

CONFIG = "training: {sequence_length: 16}\ndomains:\n  code: {path: text}\n"
FEED_FORWARD = "model.layers.*.mlp.*"


def tensors(folder: Path) -> dict[str, NDArray[Any]]:
    checkpoint = Checkpoint.of_folder(folder)
    return {name: checkpoint.read(name).float().numpy() for name in sorted(checkpoint)}


def changes(workspace: Workspace, expert: str) -> dict[str, NDArray[Any]]:
    seed = tensors(workspace.layout.seed)
    own = {**seed, **tensors(workspace.experts / expert)}
    return {name: own[name] - seed[name] for name in seed}


def merged(workspace: Workspace, expert: str, **options: Any) -> tuple[dict[str, NDArray[Any]], Recorder]:
    """Return the changes of a merge of one expert, which are its trimmed task vector, and what was reported."""
    recorder = Recorder()
    name = "-".join(["m", *(f"{key}{value}" for key, value in options.items())]).replace("_", "").replace(".", "")
    workspace.merge(
        name, method="ties", experts=(expert,), options=options, force=True, run=MergeRun(reporter=recorder)
    )
    seed = tensors(workspace.layout.seed)
    return {key: value - seed[key] for key, value in tensors(workspace.generalists / name).items()}, recorder


@pytest.mark.parametrize("changed", ["*", FEED_FORWARD])
def test_the_largest_changes_of_the_whole_model_are_kept(tmp_path: Path, new_workspace: Any, changed: str) -> None:
    """Tensors that no expert changed are not read, and count as elements of 0."""
    workspace = Workspace(new_workspace(tmp_path / "w", ("code",), changed=changed))
    vector = changes(workspace, "code")
    sizes = np.abs(np.concatenate([change.reshape(-1) for change in vector.values()]))
    threshold = np.sort(sizes)[sizes.size - int(0.2 * sizes.size)]
    kept, recorder = merged(workspace, "code", density=0.2, trim="model")
    for name, change in vector.items():
        np.testing.assert_allclose(kept[name], np.where(np.abs(change) >= threshold, change, 0), atol=1e-6)
    shares = {name: float((change != 0).mean()) for name, change in kept.items()}
    assert min(shares.values()) < 0.05 < 0.2 < max(shares.values())  # not a fifth of every tensor
    assert not any("are kept, and not" in line for line in recorder.lines)


def test_many_equal_changes_are_noted_and_can_be_cut_off(tmp_path: Path, new_workspace: Any) -> None:
    """bfloat16 with changes near its rounding step, as after a short training."""
    workspace = Workspace(new_workspace(tmp_path / "w", (), dtype="bfloat16"))
    write_coarse_expert(workspace, "code")
    sizes = np.abs(np.concatenate([change.reshape(-1) for change in changes(workspace, "code").values()]))
    for trim in ("tensor", "model"):
        kept, recorder = merged(workspace, "code", density=0.2, trim=trim)
        share = sum(int((change != 0).sum()) for change in kept.values()) / sizes.size
        assert share > 0.25, trim
        (note,) = [line for line in recorder.lines if "are kept, and not" in line]
        assert note.startswith(f"{share:.1%} of the changes of 'code' are kept, and not "), trim
        assert note.endswith("option at_threshold=first keeps the wanted number")
    exact, recorder = merged(workspace, "code", density=0.2, trim="model", at_threshold="first")
    assert sum(int((change != 0).sum()) for change in exact.values()) == int(0.2 * sizes.size)
    assert not any("are kept, and not" in line for line in recorder.lines)
    by_tensor, recorder = merged(workspace, "code", density=0.2, at_threshold="first")
    for name, change in by_tensor.items():
        assert (change != 0).sum() == max(1, int(0.2 * change.size)), name
    assert not any("are kept, and not" in line for line in recorder.lines)


def write_coarse_expert(workspace: Workspace, name: str) -> None:
    """Write an expert whose changes are one, two or three rounding steps of bfloat16, most of them one."""
    seed, generator = Checkpoint.of_folder(workspace.layout.seed), torch.Generator().manual_seed(0)
    made = {}
    for key in seed:
        tensor = torch.ones_like(seed.read(key))
        write_seed_tensor(seed, key, tensor)
        steps = torch.randint(0, 30, tensor.shape, generator=generator).clamp(max=12).div(10).ceil()
        made[key] = (tensor.float() + steps * 2**-7).to(torch.bfloat16)
    digests, files = digests_of_folder(workspace.layout.seed)
    origin = read_manifest(workspace.layout.seed)
    replace(origin, tensors=digests, files=files, digest=digest_of_tensors(digests)).write(workspace.layout.seed)
    write_tensors_as_expert(workspace.root, name, made)


def write_seed_tensor(seed: Checkpoint, name: str, tensor: torch.Tensor) -> None:
    """Overwrite a tensor of the seed's file, so that all rounding steps are equal."""
    entry = seed.entry(name)
    with entry.file.open("r+b") as file:
        file.seek(entry.begin)
        file.write(tensor_bytes(tensor))


def test_densities_may_differ_between_experts_but_not_between_tensors(shared_copy: Workspace) -> None:
    options: dict[str, Any] = {"trim": "model", "density": {"code": 0.1, "law": 1.0, "news": 0}}
    shared_copy.merge("some", method="ties", options=options)
    with pytest.raises(UserError, match=r"'code' applies to the whole model, and it is 0.5 for one tensor and 0.2"):
        shared_copy.generalists.plan(
            "other",
            method="ties",
            options={"trim": "model", "density": [{"filter": "mlp", "value": 0.2}, {"value": 0.5}]},
        )
    with pytest.raises(UserError, match="trim of 'ties' differs between tensors; set trim: model for all"):
        shared_copy.generalists.plan("other", method="ties", options={"trim": [{"filter": "mlp", "value": "model"}]})


def test_a_plan_and_threads_and_resuming_work_with_whole_models(shared_copy: Workspace) -> None:
    options = {"trim": "model", "density": 0.3, "at_threshold": "first"}
    assert shared_copy.generalists.plan("a", method="ties", options=options).seconds() > 0
    for name, threads in (("a", 1), ("b", 3)):
        shared_copy.merge(name, method="ties", options=options, run=MergeRun(settings=EngineSettings(threads=threads)))
    first, second = ((shared_copy.generalists / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_a_search_surveys_the_models_once(tmp_path: Path, new_workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(new_workspace(tmp_path / "w", ("code", "law"), config=CONFIG))
    (workspace.root / "text").mkdir()
    for number in range(40):
        (workspace.root / "text" / f"{number}.txt").write_text(" ".join(str(number * 7 % 23) for _ in range(40)))
    runs: list[Any] = []
    real = search_module.run_survey
    monkeypatch.setattr(search_module, "run_survey", lambda *given: runs.append(real(*given)) or runs[-1])
    workspace.merge(
        "m",
        method="ties",
        options={"trim": "model"},
        fit_on=("code",),
        search={"strategy": "coordinate", "trials": 3, "blocks": 2},
    )
    assert len(runs) == 1
    assert runs[0].is_complete


@pytest.fixture
def shared_copy(shared_workspace: Path, tmp_path: Path) -> Workspace:
    return Workspace(copytree(shared_workspace, tmp_path / "w"))
