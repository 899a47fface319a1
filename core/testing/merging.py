"""Checks of the properties that every per-tensor merge method must have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from ..hooks.merging import TensorGroup

if TYPE_CHECKING:
    from torch import Tensor

Merge = Callable[[TensorGroup, Any], "Tensor"]

SHAPES: tuple[tuple[int, ...], ...] = ((4, 6), (5,), (1, 1), ())
DTYPES = ("float32", "float64")


def tensor_group(
    shape: Sequence[int] = (4, 6),
    *,
    num_experts: int = 3,
    dtype: str = "float32",
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> TensorGroup:
    """Return random tensors of a seed and its experts; the default `weights` are uniform."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tuple(shape), generator=generator)
    experts = tuple((base + torch.randn(tuple(shape), generator=generator)).to(kind) for _ in range(num_experts))
    return TensorGroup(
        name="model.layers.0.mlp.up_proj.weight",
        experts=experts,
        expert_names=tuple(f"expert{index}" for index in range(num_experts)),
        weights=tuple(weights) if weights is not None else (1 / num_experts,) * num_experts,
        seed_or_none=base.to(kind),
    )


def in_numpy(group: TensorGroup) -> TensorGroup:
    """Return the group with numpy arrays, which methods for any array type receive on a CPU."""
    arrays: Any = [tensor.numpy() for tensor in group.experts]
    base: Any = group.seed.numpy()
    statistics: Any = [None if tensor is None else tensor.numpy() for tensor in group.statistics]
    return replace(group, experts=tuple(arrays), seed_or_none=base, statistics=tuple(statistics))


def assert_merge_ok(
    merge: Merge, options: Any = None, *, num_experts: int = 3, arrays: Literal["torch", "any"] = "torch"
) -> None:
    """Check a per-tensor merge function as the engine calls it; raises `AssertionError` that describes the failure.

    The function must keep shape and dtype, not modify its arguments, be deterministic, return the seed if every expert
    equals it, and not depend on the order of the experts. With `arrays="any"` it must also do so for numpy arrays,
    with the same result.
    """
    for shape in SHAPES:
        for dtype in DTYPES:
            weights = [(index + 1) / (num_experts * (num_experts + 1) / 2) for index in range(num_experts)]
            group = tensor_group(shape, num_experts=num_experts, dtype=dtype, weights=weights)
            where = f"for {dtype} {list(shape)} with {num_experts} experts"
            if arrays == "any":

                def merge_numpy(group: TensorGroup, options: Any) -> Tensor:
                    return _as_tensor(merge(in_numpy(group), options))

                assert _close(merge_numpy(group, options), merge(group, options)), (
                    f"numpy arrays and torch tensors give different results {where}"
                )
                _check(merge_numpy, group, options, f"{where} in numpy")
            _check(merge, group, options, where)


def _as_tensor(array: Any) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)


def _check(merge: Merge, group: TensorGroup, options: Any, where: str) -> None:
    import torch

    originals = [tensor.clone() for tensor in (group.seed, *group.experts)]
    merged = merge(group, options)
    assert isinstance(merged, torch.Tensor), f"the merge returns {type(merged).__name__} instead of a tensor {where}"
    assert merged.shape == group.seed.shape, f"the merge returns shape {list(merged.shape)} {where}"
    assert merged.dtype == group.seed.dtype, f"the merge returns {merged.dtype} {where}"
    assert bool(torch.isfinite(merged).all()), f"the merge returns non-finite numbers {where}"
    for before, after in zip(originals, (group.seed, *group.experts), strict=True):
        assert torch.equal(before, after), f"the merge modifies its input tensors {where}"
    assert torch.equal(merged, merge(group, options)), f"the merge returns a different result the second time {where}"
    copies = replace(group, experts=tuple(group.seed.clone() for _ in group.experts))
    assert _close(merge(copies, options), group.seed), f"merging copies of the seed does not return the seed {where}"
    permuted = replace(
        group,
        experts=group.experts[1:] + group.experts[:1],
        expert_names=group.expert_names[1:] + group.expert_names[:1],
        weights=group.weights[1:] + group.weights[:1],
    )
    assert _close(merge(permuted, options), merged), f"the merge depends on the order of the experts {where}"


def _close(actual: Tensor, expected: Tensor) -> bool:
    import torch

    return torch.allclose(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)
