"""Devices that are not there: tensors live on the CPU, remember a device, and refuse to meet those of another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_MOVES = (Tensor.device.__get__, Tensor.to, Tensor.data.__get__, Tensor.data.__set__)  # type: ignore[attr-defined]


class FakeDevices(TorchFunctionMode):
    """Within the block, tensors can be moved to any device, and are computed on the CPU.

    As with real devices, an operation on tensors of several devices fails; only scalars of the CPU go with any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.computed_on: set[torch.device] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        get_device, move, get_data, set_data = _MOVES
        if func == get_device:
            return device_of(args[0])
        if func == get_data:
            return tagged(func(*args), device_of(args[0]))
        if func == set_data:
            func(*args)
            args[0].fake_device = device_of(args[1])
            return None
        if func is move:
            return self._moved(*args, **kwargs)
        devices = {device_of(tensor) for tensor in tensors_in((args, kwargs)) if tensor.dim() or on_fake(tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{func.__name__} of tensors on {', '.join(sorted(map(str, devices)))}")
        device = next(iter(devices), CPU)
        if kwargs.get("device") is not None:
            device, kwargs["device"] = torch.device(kwargs["device"]), CPU
        self.computed_on.add(device)
        return tagged(func(*args, **kwargs), device)

    def _moved(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return a copy on another device, or what `to` returns on the same."""
        places = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, str | torch.device | Tensor)]
        device = device_of(tensor)
        for place in places:
            device = device_of(place) if isinstance(place, Tensor) else torch.device(place)
        rest = [
            arg.dtype if isinstance(arg, Tensor) else arg for arg in args if not isinstance(arg, str | torch.device)
        ]
        named = {name: value for name, value in kwargs.items() if name != "device"}
        result: Tensor = tensor.to(*rest, **named) if rest or named else tensor
        if device != device_of(tensor):
            result = result.detach().clone()
        return tagged(result, device)


def device_of(tensor: Tensor) -> torch.device:
    """Return the device that a tensor remembers."""
    device: torch.device = getattr(tensor, "fake_device", CPU)
    return device


def on_fake(tensor: Tensor) -> bool:
    return device_of(tensor) != CPU


def tagged(result: Any, device: torch.device) -> Any:
    """Return a result whose tensors remember the device."""
    for tensor in tensors_in(result):
        tensor.fake_device = device  # type: ignore[attr-defined]
    return result


def tensors_in(content: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from tensors_in(value)
    elif isinstance(content, tuple | list):
        for value in content:
            yield from tensors_in(value)
