"""Members of ensembles and stitched models on several devices.

A device map is `auto`, text such as `code=cuda:0,law=cpu`, or a dictionary of devices by member. Members that it does not
name are on the default device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, first_line, unknown_name
from .compute import best_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

DeviceMap = str | Mapping[str, str]
AUTO = "auto"


def check_device_map(device_map: DeviceMap, members: Collection[str], folder: Path) -> None:
    """Raise `UserError` for a model without members, an unknown member and a device that is not there."""
    if not members:
        raise UserError(
            f"{folder} has no members that could be on several devices; only ensembles and stitched models take a device map"
        )
    for name, device in _by_member(device_map).items():
        if name not in members:
            raise unknown_name("member", name, members, listed_as=f"{folder.name} has")
        _require_usable(_device(device))


def place_members(model: PreTrainedModel, device_map: DeviceMap) -> None:
    """Move the members of a model to their devices, and the rest of it to the device of its first member.

    Tensors that members share stay shared where their device is the same.
    """
    holder: Any = model
    members: dict[str, PreTrainedModel] = holder.named_members
    if device_map == AUTO:
        devices = _spread({name: _num_bytes(member) for name, member in members.items()})
    else:
        named = _by_member(device_map)
        devices = {name: _device(named.get(name, best_device())) for name in members}
    moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
    placed: set[int] = set()
    for name, member in members.items():
        for tensor in (*member.parameters(), *member.buffers()):
            key = (tensor.data_ptr(), devices[name])
            if key not in moved or moved[key][0].shape != tensor.shape:
                # the original is kept, since its address could be used again
                moved[key] = (tensor.data, tensor.data.to(devices[name]))
            tensor.data = moved[key][1]
            placed.add(id(tensor))
    home = next(iter(devices.values()))
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in placed:
            tensor.data = tensor.data.to(home)


def _by_member(device_map: DeviceMap) -> dict[str, str]:
    """Return the devices by member; none for `auto`."""
    if isinstance(device_map, Mapping):
        return dict(device_map)
    devices: dict[str, str] = {}
    if device_map == AUTO:
        return devices
    for part in device_map.split(","):
        name, separator, device = (piece.strip() for piece in part.partition("="))
        if not (name and separator and device):
            raise UserError(
                f"'{part.strip()}' in the device map is not MEMBER=DEVICE; write code=cuda:0,law=cpu or auto"
            )
        if name in devices:
            raise UserError(f"'{name}' is given twice in the device map")
        devices[name] = device
    return devices


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"'{name}' in the device map is not a device; write cpu or cuda:0") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"there is no device '{name}'; GPUs of this machine: {count}")
    return device


def _require_usable(device: torch.device) -> None:
    """Raise `UserError` for a device without tensors that can be read: `meta`, and those that this torch does not have."""
    import torch

    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' of the device map cannot be used here: {first_line(error)}") from None


def _spread(sizes: Mapping[str, int]) -> dict[str, torch.device]:
    """Return a GPU for each member, the largest first to the one with the fewest bytes; the CPU if there are none."""
    import torch

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not gpus:
        return dict.fromkeys(sizes, torch.device("cpu"))
    used = dict.fromkeys(gpus, 0)
    devices = {}
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        devices[name] = min(gpus, key=lambda gpu: used[gpu])
        used[devices[name]] += sizes[name]
    return {name: devices[name] for name in sizes}


def _num_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
