"""What every per-tensor merge method should hold to, checked in one call."""

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
    """Return random tensors of a seed and its experts; without `weights` the experts weigh the same."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    source = torch.Generator().manual_seed(seed)
    base = torch.randn(tuple(shape), generator=source)
    experts = tuple((base + torch.randn(tuple(shape), generator=source)).to(kind) for _ in range(num_experts))
    return TensorGroup(
        name="model.layers.0.mlp.up_proj.weight",
        experts=experts,
        expert_names=tuple(f"expert{index}" for index in range(num_experts)),
        weights=tuple(weights) if weights is not None else (1 / num_experts,) * num_experts,
        seed_or_none=base.to(kind),
    )


def in_numpy(group: TensorGroup) -> TensorGroup:
    """Return the group with numpy arrays, as methods for any arrays are given them on a CPU."""
    arrays: Any = [tensor.numpy() for tensor in group.experts]
    base: Any = group.seed.numpy()
    known: Any = [None if one is None else one.numpy() for one in group.statistics]
    return replace(group, experts=tuple(arrays), seed_or_none=base, statistics=tuple(known))


def assert_merge_ok(
    merge: Merge, options: Any = None, *, num_experts: int = 3, arrays: Literal["torch", "any"] = "torch"
) -> None:
    """Check a per-tensor merge function as the engine will call it; raises `AssertionError` that says what fails.

    It must keep shape and dtype, leave its arguments alone, answer the same when asked again, give the seed
    when every expert equals it, and not care in which order the experts come. With `arrays="any"` it must do so for
    numpy arrays too, with the same result.
    """
    for shape in SHAPES:
        for dtype in DTYPES:
            group = tensor_group(
                shape, num_experts=num_experts, dtype=dtype, weights=_uneven_weights(num_experts)
            )
            where = f"for {dtype} {list(shape)} with {num_experts} experts"
            if arrays == "any":
                found, expected = _as_tensor(merge(in_numpy(group), options)), merge(group, options)
                assert _close(found, expected), (
                    f"numpy arrays and torch tensors give different results {where}"
                )
                merge_numpy: Merge = lambda one, chosen: _as_tensor(merge(in_numpy(one), chosen))  # noqa: E731
                _check(merge_numpy, group, options, f"{where} in numpy")
            _check(merge, group, options, where)


def _check(merge: Merge, group: TensorGroup, options: Any, where: str) -> None:
    _check_result(merge, group, options, where)
    _check_identity(merge, group, options, where)
    _check_order(merge, group, options, where)


def _as_tensor(array: Any) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)


def _check_result(merge: Merge, group: TensorGroup, options: Any, where: str) -> None:
    import torch

    untouched = [tensor.clone() for tensor in (group.seed, *group.experts)]
    merged = merge(group, options)
    assert isinstance(merged, torch.Tensor), f"the merge gives a {type(merged).__name__}, no tensor, {where}"
    assert merged.shape == group.seed.shape, f"the merge gives shape {list(merged.shape)} {where}"
    assert merged.dtype == group.seed.dtype, f"the merge gives {merged.dtype} {where}"
    assert bool(torch.isfinite(merged).all()), f"the merge gives numbers that are not finite {where}"
    for before, after in zip(untouched, (group.seed, *group.experts), strict=True):
        assert torch.equal(before, after), f"the merge changes the tensors it is given {where}"
    assert torch.equal(merged, merge(group, options)), (
        f"the merge gives another result the second time {where}"
    )


def _check_identity(merge: Merge, group: TensorGroup, options: Any, where: str) -> None:
    copies = replace(group, experts=tuple(group.seed.clone() for _ in group.experts))
    assert _close(merge(copies, options), group.seed), (
        f"merging copies of the seed does not give the seed {where}"
    )


def _check_order(merge: Merge, group: TensorGroup, options: Any, where: str) -> None:
    turned = replace(
        group,
        experts=group.experts[1:] + group.experts[:1],
        expert_names=group.expert_names[1:] + group.expert_names[:1],
        weights=group.weights[1:] + group.weights[:1],
    )
    assert _close(merge(turned, options), merge(group, options)), (
        f"the merge changes when the experts come in another order {where}"
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    import torch

    return torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


def _uneven_weights(count: int) -> tuple[float, ...]:
    """Return different weights that sum to 1."""
    return tuple((index + 1) / (count * (count + 1) / 2) for index in range(count))
