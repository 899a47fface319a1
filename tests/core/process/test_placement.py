"""Members on several devices: what has to be on one device is, and the results are those of one device."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_devices import FakeDevices

from expertctl import UserError, Workspace, load_model
from expertctl.core.models.loading import load_network
from expertctl.core.process import placement
from expertctl.core.process.placement import place_members

TEXT = torch.tensor([[72, 41, 8, 8, 99, 250, 3, 17], [9, 210, 33, 77, 6, 140, 140, 2]])
MAPS = [
    ("forest", {"code": "mps:0", "law": "mps:1"}),
    ("forest", {"code": "cpu", "law": "mps:1", "news": "mps:0"}),
    ("chosen", {"code": "cpu", "law": "mps:1", "news": "mps:0"}),
    ("stitched", {"hub": "mps:0", "code": "mps:1"}),
    ("stitched", {"code": "mps:1", "law": "mps:1"}),
]
"""Models and their device maps."""


@pytest.fixture(scope="module")
def workspace(shared_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(shutil.copytree(shared_workspace, tmp_path_factory.mktemp("placed") / "workspace"))
    uniform: dict[str, Any] = {"prior": "uniform"}
    workspace.merge("forest", method="ensemble", options=uniform)
    workspace.merge("chosen", method="ensemble", options={**uniform, "top_k": 1, "every": 3})
    workspace.merge("stitched", method="stitch", options={"num_stitches": 2})
    return workspace


def results(model: Any) -> list[torch.Tensor]:
    """Return what a model computes in all ways, on the CPU: logits, with padding, scores, and generated text."""
    home = model.device
    text = TEXT.to(home)
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    found = [model(text).logits, model(text, attention_mask=mask).logits]
    if hasattr(model, "target_log_probs"):
        found += [model.target_log_probs(text), model.responsibilities(text)]
    if home.type == "cpu":  # transformers makes events of the model's device
        found.append(model.generate(text, attention_mask=mask, max_new_tokens=8, do_sample=False))
    assert all(tensor.device == home for tensor in found)
    return [tensor.to("cpu") for tensor in found]


def randomised(model: Any) -> Any:
    """Give new stitches numbers that matter."""
    source = torch.Generator().manual_seed(0)
    for parameter in model.stitches.parameters() if hasattr(model, "stitches") else ():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=source)
    return model


@pytest.mark.parametrize(("name", "device_map"), MAPS)
def test_members_on_several_devices_compute_what_they_compute_on_one(
    workspace: Workspace, name: str, device_map: dict[str, str]
) -> None:
    folder = workspace.layout.artefact(name)
    with torch.inference_mode():
        expected = results(randomised(load_network(folder)))
        assert len(expected) == (3 if name == "stitched" else 5)
    with FakeDevices() as devices, torch.no_grad():
        model: Any = randomised(load_network(folder))
        place_members(model, device_map)
        for member, device in device_map.items():
            found = {parameter.device for parameter in model.named_members[member].parameters()}
            assert found == {torch.device(device)}
        got = results(model)
    assert {torch.device(device) for device in device_map.values()} <= devices.computed_on
    for tensor, other in zip(got, expected, strict=False):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0)


def test_the_fake_devices_notice_what_is_not_moved() -> None:
    with FakeDevices(), pytest.raises(RuntimeError, match="of tensors on cpu, mps:0"):
        _ = torch.ones(2).to("mps:0") + torch.ones(2)


def test_shared_tensors_stay_shared_on_one_device(new_workspace: Any, tmp_path: Path) -> None:
    root = new_workspace(tmp_path / "workspace", changed="model.layers.*.mlp.*")
    Workspace(root).merge("forest", method="ensemble", options={"prior": "uniform"})
    with FakeDevices():
        model: Any = load_network(root / "generalists" / "forest")
        place_members(model, {"code": "mps:0", "law": "mps:1", "news": "mps:1"})
        code, law, news = (dict(member.named_parameters()) for member in model.members)
        name = "model.layers.0.self_attn.q_proj.weight"
        assert law[name].data_ptr() == news[name].data_ptr() != code[name].data_ptr()


@pytest.mark.parametrize(
    ("model", "device_map", "message"),
    [
        (
            "seed",
            "seed=cpu",
            "seed has no members that could be on several devices; only ensembles and stitched models",
        ),
        ("code", "auto", "code has no members"),
        ("forest", "low=cpu", r"no member 'low' \(did you mean 'law'\?\); forest has: code, law, news"),
        ("stitched", {"seed": "cpu"}, "no member 'seed'; stitched has: code, hub, law, news"),
        ("forest", "law=gpu", "'gpu' in the device map is not a device; write cpu or cuda:0"),
        ("forest", "law=cuda:7", r"there is no device 'cuda:7'; GPUs of this machine: \d"),
        ("forest", "law", "'law' in the device map is not MEMBER=DEVICE; write code=cuda:0,law=cpu or auto"),
        ("forest", "law=cpu,law=cpu", "'law' is given twice in the device map"),
    ],
)
def test_maps_that_do_not_fit_are_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, model: str, device_map: Any, message: str
) -> None:
    monkeypatch.setattr("expertctl.core.models.loading._from_pretrained", None)  # no weights are loaded
    with pytest.raises(UserError, match=message) as error:
        load_model(workspace.layout.artefact(model), device_map=device_map)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gpus", "sizes", "expected"),
    [
        (2, {"a": 5, "b": 9, "c": 5}, {"a": "cuda:1", "b": "cuda:0", "c": "cuda:1"}),
        (1, {"a": 5, "b": 9}, {"a": "cuda:0", "b": "cuda:0"}),
        (0, {"a": 5, "b": 9}, {"a": "cpu", "b": "cpu"}),
    ],
)
def test_auto_spreads_members_by_size(
    monkeypatch: pytest.MonkeyPatch, gpus: int, sizes: Mapping[str, int], expected: Mapping[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    devices = placement._spread(sizes)
    assert devices == {name: torch.device(device) for name, device in expected.items()}
    assert list(devices) == list(sizes), "in the order of the members"


def test_evaluation_and_generation_take_a_map(workspace: Workspace) -> None:
    plain = workspace.generate("forest", "a b", shares=True)
    assert workspace.generate("forest", "a b", shares=True, device_map="code=cpu,law=cpu") == plain
    with pytest.raises(UserError, match="seed has no members"):
        workspace.evaluate("forest", "seed", domains=["none"], device_map="auto")
    with pytest.raises(UserError, match="a device map is for one process; give either nproc or device_map"):
        workspace.evaluate("forest", domains=["none"], device_map="auto", nproc=2)
