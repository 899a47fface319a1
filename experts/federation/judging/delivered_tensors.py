"""Checks of a delivered expert's tensors: exactly those that its trainer changes, as training could have changed them.

An adapter is judged by its own tensors and by the tensors of the seed with it. Tensors are compared with the seed's piece by piece, so that memory does not grow with the size of the expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ....core.artefacts.files import json_text, read_json
from ....core.artefacts.numeric import FLOATING
from ....core.artefacts.safetensors_io import SINGLE_FILE, Checkpoint, TensorEntry, torch_dtype
from ....core.hooks.options import parse_options
from ....core.hooks.training import SideTensor
from ....core.manifests.manifest import read_manifest
from ....core.models.adapters.lora import AdaptedTensors
from ....core.models.adapters.prompts import is_prompt
from ...runs.trainable import changeable_tensors, trainer_for
from ..protocol.requests import Recipe
from .refusal import Refusal, RefusalCode, Refused

if TYPE_CHECKING:
    from torch import Tensor

MAX_CHANGE = 2.0
"""Largest change of a tensor: norm of the difference divided by the norm of the seed's tensor. Training changes tensors by less
than 1."""
NORM_RANGE = (1 / 3, 3.0)
"""Range of a tensor's norm, divided by that of the seed's tensor."""
MASKS = (".masked_bias", ".attn.bias")
"""Ends of the names of causal masks, which older models store."""
SMALL_VECTOR, SMALL_MATRIX = 0.1, 0.02
"""Root mean squares below which a vector, such as a bias that began at 0, or a matrix may change by as much as one of this size.
Matrices begin with about 0.02 before any training."""


def check_tensors(folder: Path, recipe: Recipe, seed: Path) -> None:
    """Compare every tensor with the seed's tensor of the same name; raises `Refused`."""
    expert, base = Checkpoint([folder / SINGLE_FILE]), Checkpoint.of_folder(seed)
    model_type = str(read_json(seed / "config.json").get("model_type"))
    trainable = changeable_tensors(recipe.trains, base, model_type)
    for name in expert:
        if name not in base:
            raise Refused(RefusalCode.SHAPES, f"the seed has no tensor '{name:.100}'")
        refusal = refusal_of_entry(expert.entry(name), base.entry(name), "the seed's")
        if refusal is not None:
            raise Refused(refusal.code, refusal.detail)
        if name not in trainable:
            raise Refused(RefusalCode.FROZEN, f"'{name}'")
    # training can leave a vector as it was, and then an expert does not store it; and some vectors are computed
    missing = sorted(
        name
        for name in trainable - set(expert)
        if base.entry(name).dtype in FLOATING and len(base.entry(name).shape) > 1 and not name.endswith(MASKS)
    )
    if missing or not list(expert):
        example = f", such as '{missing[0]}'" if missing else ""
        raise Refused(RefusalCode.FILES, f"{len(missing)} matrices are missing{example}")
    digests = read_manifest(seed).tensors
    for name in expert:
        if base.entry(name).dtype not in FLOATING:
            if expert.digest(name) != digests.get(name):
                raise Refused(RefusalCode.FROZEN, f"'{name}' has no numbers that can be trained")
            continue
        _check_movement(movement_of(expert, base, name), name)


def check_adapted(folder: Path, seed: Path) -> None:
    """Compare the seed's tensors with an adapter, whose own tensors were checked, with those without it; raises `Refused`.

    A prompt changes none of them.
    """
    if is_prompt(folder):
        return
    base = Checkpoint.of_folder(seed)
    adapted = AdaptedTensors(base, folder)
    for name in adapted:
        _check_movement(movement_of(adapted, base, name), name)


def _check_movement(moved: Movement, name: str) -> None:
    if not moved.change <= MAX_CHANGE:
        raise Refused(RefusalCode.NORM, f"'{name}' by {moved.change:.3g} times its norm; {MAX_CHANGE:g} is allowed")
    least, largest = NORM_RANGE
    if moved.norm_ratio is not None and not least <= moved.norm_ratio <= largest:
        raise Refused(
            RefusalCode.NORM,
            f"the norm of '{name}' is {moved.norm_ratio:.3g} times the seed's; {least:.2f} to {largest:.2f} is allowed",
        )
    if moved.cosine is not None and not moved.cosine > 0:
        raise Refused(RefusalCode.NORM, f"'{name}' points away from the seed's tensor (cosine {moved.cosine:.2f})")


def refusal_of_entry(entry: TensorEntry, expected: TensorEntry, label: str) -> Refusal | None:
    """Refuse a tensor of another shape or dtype than the expected one, which the refusal calls `label`."""
    if entry.shape != expected.shape:
        return Refusal(RefusalCode.SHAPES, f"'{entry.name}' is {list(entry.shape)}, {label} {list(expected.shape)}")
    if entry.dtype != expected.dtype:
        return Refusal(RefusalCode.DTYPES, f"'{entry.name}' is {entry.dtype}, {label} {expected.dtype}")
    return None


@dataclass(frozen=True)
class Movement:
    """How far a tensor is from the seed's."""

    change: float
    """Norm of the difference, divided by the norm of the seed's tensor, or of a small tensor if that is larger."""
    norm_ratio: float | None
    """Norm, divided by that of the seed's tensor; None for a small tensor."""
    cosine: float | None
    """Cosine of the angle to the seed's tensor; None for a small tensor."""


def movement_of(expert: Checkpoint | AdaptedTensors, base: Checkpoint, name: str) -> Movement:
    """Return how far a tensor has moved; both are read in pieces. Raises `Refused` for values that are not finite."""
    import torch

    squared_change = squared_norm = squared_base = product = count = 0.0
    base_pieces = _values(base, name, f"the seed's '{name}'")
    if isinstance(expert, AdaptedTensors):
        values, base_pieces = expert.read(name).flatten(), iter([torch.cat(list(base_pieces))])
        expert_pieces = iter([_finite(values, f"'{name}'")])
    else:
        expert_pieces = _values(expert, name, f"'{name}'")
    pieces = zip(expert_pieces, base_pieces, strict=True)
    for values, base_values in pieces:
        squared_change += _squared_norm(values - base_values)
        squared_norm += _squared_norm(values)
        squared_base += _squared_norm(base_values)
        product += float(torch.dot(values.double(), base_values.double()))
        count += values.numel()
    small = SMALL_MATRIX if len(base.entry(name).shape) > 1 else SMALL_VECTOR
    floor = count * small**2
    change = math.sqrt(squared_change / (max(squared_base, floor) or 1.0))
    if squared_base <= floor:
        return Movement(change, None, None)
    norms = math.sqrt(squared_norm * squared_base)
    return Movement(change, math.sqrt(squared_norm / squared_base), product / norms if norms else 0.0)


def side_files(recipe: Recipe, seed: Path) -> Mapping[str, Mapping[str, SideTensor]]:
    """Return the files beside the model's that an expert of a recipe has, with their tensors."""
    trainer = trainer_for(recipe.trains)
    if trainer.side_files is None:
        return {}
    options = parse_options(trainer.options, dict(recipe.options), f"trainer '{trainer.name}'")
    return trainer.side_files(seed, options)


def check_side_documents(folder: Path, recipe: Recipe, seed: Path) -> None:
    """Compare the JSON files beside the tensors with what the trainer writes; raises `Refused`."""
    trainer = trainer_for(recipe.trains)
    if trainer.side_documents is not None:
        options = parse_options(trainer.options, dict(recipe.options), f"trainer '{trainer.name}'")
        for name, content in trainer.side_documents(seed, options).items():
            if (folder / name).read_bytes() != json_text(content).encode():
                raise Refused(RefusalCode.MANIFEST, f"{name} is not what the recipe leads to")


def check_side_files(folder: Path, side: Mapping[str, Mapping[str, SideTensor]]) -> None:
    """Compare the tensors beside the model's, such as router rows, with what the trainer writes; raises `Refused`."""
    for file, expected in side.items():
        stored = Checkpoint([folder / file])
        names = {name for name, tensor in expected.items() if tensor.is_required}
        if not names <= set(stored) <= set(expected):
            raise Refused(
                RefusalCode.SHAPES, f"{file} has {', '.join(sorted(stored))[:100]}; {', '.join(expected)} belong there"
            )
        for name in stored:
            entry, tensor = stored.entry(name), expected[name]
            label = f"'{name}' of {file}"
            if entry.dtype not in FLOATING or tensor.dtype not in (None, entry.dtype):
                raise Refused(RefusalCode.DTYPES, f"{label} is {entry.dtype}")
            if tuple(entry.shape) != tensor.shape:
                raise Refused(
                    RefusalCode.SHAPES, f"{label} is {list(entry.shape)}, and {list(tensor.shape)} belongs there"
                )
            for values in _values(stored, name, label):
                if values.numel() and not (
                    tensor.least <= float(values.min()) and float(values.max()) <= tensor.largest
                ):
                    raise Refused(
                        RefusalCode.NORM, f"{label} leaves the range of {tensor.least:g} to {tensor.largest:g}"
                    )


def _values(checkpoint: Checkpoint, name: str, label: str) -> Iterator[Tensor]:
    """Yield the pieces of a tensor as float32, or float64 if stored as such; refuses values that are not finite."""
    import torch

    dtype = torch_dtype(checkpoint.entry(name).dtype)
    for chunk in checkpoint.chunks(name):
        values = upcast(torch.frombuffer(bytearray(chunk), dtype=torch.uint8).view(dtype))
        yield _finite(values, label)


def _finite(values: Tensor, label: str) -> Tensor:
    import torch

    if not bool(torch.isfinite(values.abs().max() if values.numel() else torch.zeros(()))):
        raise Refused(RefusalCode.NOT_FINITE, label)
    return values


def upcast(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype used for comparing and averaging: float64 stays, other dtypes become float32."""
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _squared_norm(values: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())
