"""The streaming merge: tensor by tensor from seed and experts into one checkpoint, never a model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.loading import WEIGHTS_FILE, ExpertTensors
from ..core.safetensors_io import Checkpoint, torch_dtype, write_file
from ..core.types import MergeInputs, MergeMethod, TensorGroup

if TYPE_CHECKING:
    from torch import Tensor


def merge_tensors(method: MergeMethod, inputs: MergeInputs, options: Any, folder: Path) -> None:
    """Write `folder/model.safetensors`, each tensor merged by the method, in the seed's dtypes and order.

    Raises `UserError` when an expert's tensors do not fit the seed's, before anything is written.
    """
    seed = Checkpoint.of_folder(inputs.seed)
    experts = {name: ExpertTensors(seed, path) for name, path in inputs.experts.items()}
    shapes = {name: (entry.dtype, entry.shape) for name, entry in seed.entries.items()}
    write_file(folder / WEIGHTS_FILE, shapes, _merged(method, seed, experts, inputs.weights, options))


def _merged(
    method: MergeMethod,
    seed: Checkpoint,
    experts: Mapping[str, ExpertTensors],
    weights: Mapping[str, float],
    options: Any,
) -> Iterator[tuple[str, Tensor]]:
    assert method.merge is not None
    for name in seed:
        base = seed.read(name)
        if not base.is_floating_point():
            yield name, _agreed(name, base, experts)
            continue
        group = TensorGroup(
            name=name,
            seed=base,
            experts=tuple(
                expert.read(name) if name in expert.changed else base for expert in experts.values()
            ),
            expert_names=tuple(experts),
            weights=tuple(weights.values()),
        )
        merged = method.merge(group, options)
        if merged.shape != base.shape:
            raise UserError(
                f"merge method '{method.name}' made '{name}' {list(merged.shape)}; the seed's is {list(base.shape)}"
            )
        yield name, merged.to(torch_dtype(seed.entry(name).dtype))


def _agreed(name: str, base: Tensor, experts: Mapping[str, ExpertTensors]) -> Tensor:
    """Return an integer tensor that all agree on: counts and indices are never averaged."""
    for expert_name, expert in experts.items():
        if name in expert.changed and not bool((expert.read(name) == base).all()):
            raise UserError(f"integer tensor '{name}' differs between the seed and expert '{expert_name}'")
    return base
