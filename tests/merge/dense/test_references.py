"""Every dense method against a few naive lines in float64, on numpy arrays and on torch tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from expertctl.core.hooks.manager import installed_plugins
from expertctl.core.hooks.merging import MergeMethod, TensorGroup, TensorMerge
from expertctl.core.hooks.options import parse_options
from expertctl.core.testing import in_numpy
from expertctl.merge.dense.arrays import random_mask
from expertctl.merge.dense.task_vectors.della import keep_probabilities

Array = np.ndarray[Any, Any]
SHAPES = [(300, 251), (8, 6), (7,), (1,), ()]


def group_of(shape: tuple[int, ...], count: int, weights: tuple[float, ...], seed: int = 0, **more: Any) -> TensorGroup:
    source = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=source)
    experts = tuple(base + 0.3 * torch.randn(shape, generator=source) for _ in range(count))
    names = tuple(f"e{number}" for number in range(count))
    return TensorGroup("model.layers.0.mlp.up_proj.weight", experts, names, weights, base, **more)


def wide(group: TensorGroup) -> tuple[Array, list[Array], list[float]]:
    return group.seed.double().numpy(), [expert.double().numpy() for expert in group.experts], list(group.weights)


def agree(vectors: list[Array], weights: list[float], normalize: bool) -> Array:
    summed = sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
    sign = np.where(summed >= 0, 1, -1)
    masks = [np.sign(weight * vector) == sign for weight, vector in zip(weights, vectors, strict=True)]
    mix = sum(mask * weight * vector for mask, weight, vector in zip(masks, weights, vectors, strict=True))
    divisor = (
        sum(mask * weight for mask, weight in zip(masks, weights, strict=True)) if normalize else np.ones_like(sign)
    )
    return mix / np.where(divisor == 0, 1, divisor)


def top(vector: Array, density: float) -> Array:
    """Trim by magnitude in float32, as it is stored."""
    sizes = np.sort(np.abs(vector.astype("f4")).ravel())[::-1]
    return vector * (np.abs(vector.astype("f4")) >= sizes[max(1, int(density * sizes.size)) - 1])


def naive_linear(group: TensorGroup) -> Array:
    _, experts, weights = wide(group)
    return sum(w * x for w, x in zip(weights, experts, strict=True)) / sum(weights)


def naive_task_arithmetic(group: TensorGroup) -> Array:
    seed, experts, weights = wide(group)
    return seed + 0.7 * sum(w * (x - seed) for w, x in zip(weights, experts, strict=True))


def naive_ties(group: TensorGroup) -> Array:
    seed, experts, weights = wide(group)
    deltas = [top((x.astype("f4") - seed.astype("f4")).astype("f8"), 0.3) for x in experts]
    return seed + 0.5 * agree(deltas, weights, normalize=True)


def masked(group: TensorGroup, density: float, random_seed: int = 0) -> list[Array]:
    seed, experts, _ = wide(group)
    masks = [random_mask(seed, density, random_seed, group.name, name).astype("f8") for name in group.expert_names]
    return [mask * (x - seed) for mask, x in zip(masks, experts, strict=True)]


def naive_dare_linear(group: TensorGroup) -> Array:
    seed, _, weights = wide(group)
    return seed + sum(w * d / 0.4 for w, d in zip(weights, masked(group, 0.4, 3), strict=True))


def naive_dare_l1(group: TensorGroup) -> Array:
    seed, experts, weights = wide(group)
    vectors = []
    for kept, x in zip(masked(group, 0.4), experts, strict=True):
        whole, part = np.abs(x - seed).sum(), np.abs(kept).sum()
        vectors.append(kept * (whole / part if part > 1e-7 else 1))
    return seed + agree(vectors, weights, normalize=True)


def naive_della(group: TensorGroup) -> Array:
    seed, experts, weights = wide(group)
    vectors = []
    for name, x in zip(group.expert_names, experts, strict=True):
        delta = x.astype("f4") - seed.astype("f4")
        rows = np.abs(delta).reshape(delta.shape[0] if delta.ndim > 1 else 1, -1)
        ranks = rows.argsort(axis=1, kind="stable").argsort(axis=1)
        chances = 0.5 - 0.1 + 0.2 * ranks / max(rows.shape[1] - 1, 1)
        chances = chances.reshape(delta.shape)
        mask = random_mask(seed, chances.astype("f4"), 0, group.name, name)
        vectors.append(mask * delta.astype("f8") / chances)
    return seed + agree(vectors, weights, normalize=True)


def naive_breadcrumbs(group: TensorGroup) -> Array:
    seed, experts, weights = wide(group)
    vectors = []
    for x in experts:
        delta = (x.astype("f4") - seed.astype("f4")).astype("f8")
        order = np.sort(np.abs(delta).ravel())
        wanted, outliers = int(0.6 * order.size), int(0.1 * order.size)
        below = max(0, order.size - wanted - outliers)
        kept = order[below : below + wanted]
        low, high = (kept[0], kept[-1]) if kept.size else (np.inf, np.inf)
        vectors.append(delta * ((np.abs(delta) >= low) & (np.abs(delta) <= high)))
    return seed + sum(w * d for w, d in zip(weights, vectors, strict=True))


def naive_sce(group: TensorGroup) -> Array:
    seed, experts, _ = wide(group)
    deltas = np.stack([x.astype("f4") - seed.astype("f4") for x in experts]).astype("f8")
    squares = (deltas**2).reshape(len(experts), -1).mean(axis=1)
    shares = list(squares / squares.sum()) if squares.sum() > 0 else [1 / len(experts)] * len(experts)
    positive = deltas.sum(axis=0) >= 0
    masks = [np.sign(delta) == np.where(positive, 1, -1) for delta in deltas]
    mix = sum(s * m * d for s, m, d in zip(shares, masks, deltas, strict=True))
    return seed + mix / np.maximum(sum(s * m for s, m in zip(shares, masks, strict=True)), 1e-6)


def naive_model_stock(group: TensorGroup) -> Array:
    seed, experts, _ = wide(group)
    deltas = [(x - seed).ravel() for x in experts]
    pairs = [a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6) for a, b in itertools.combinations(deltas, 2)]
    c, n = max(np.mean(pairs), 0.0), len(experts)
    t = n * c / (1 + (n - 1) * c)
    return t * sum(experts) / n + (1 - t) * seed


def naive_nearswap(group: TensorGroup) -> Array:
    seed, (expert,), _ = wide(group)
    share = np.clip(0.1 / np.maximum(np.abs(seed - expert), 1e-6), 0, 1)
    return share * expert + (1 - share) * seed


def arc(a: Array, b: Array, t: float) -> Array:
    cosine = np.clip((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def naive_slerp(group: TensorGroup) -> Array:
    _, (a, b), _ = wide(group)
    return arc(a, b, 0.3)


def naive_nuslerp_rows(group: TensorGroup) -> Array:
    seed, (a, b), (v, w) = wide(group)
    if a.ndim < 2:
        return seed + arc(a - seed, b - seed, w / (v + w))
    return np.stack([s + arc(x - s, y - s, w / (v + w)) for s, x, y in zip(seed, a, b, strict=True)])


def naive_karcher(group: TensorGroup) -> Array:
    """The mean on the sphere, by many small steps on the vectors themselves."""
    _, experts, weights = wide(group)
    shares = np.array(weights) / sum(weights)
    flat = [x.ravel() for x in experts]
    units = [x / np.linalg.norm(x) for x in flat]
    mean = sum(s * u for s, u in zip(shares, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(200):
        step = np.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            cosine = np.clip(mean @ unit, -1, 1)
            angle = np.arccos(cosine)
            if angle > 1e-7:
                step += share * angle / np.sin(angle) * (unit - cosine * mean)
        size = np.linalg.norm(step)
        if size < 1e-9:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
    length = sum(s * np.linalg.norm(x) for s, x in zip(shares, flat, strict=True))
    return (mean * length).reshape(experts[0].shape)


def naive_multislerp(group: TensorGroup) -> Array:
    seed, experts, weights = wide(group)
    shares = np.array(weights) / sum(weights)
    flat = [(x - seed).ravel() for x in experts]
    units = [x / (np.linalg.norm(x) + 1e-8) for x in flat]
    mean = sum(s * u for s, u in zip(shares, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(s * (u - (u @ mean) * mean) for s, u in zip(shares, units, strict=True))
    size = np.linalg.norm(tangent) + 1e-8
    length = sum(s * np.linalg.norm(x) for s, x in zip(shares, flat, strict=True))
    return seed + ((mean * np.cos(size) + tangent * np.sin(size) / size) * length).reshape(seed.shape)


def naive_arcee_fusion(group: TensorGroup) -> Array:
    seed, (expert,), _ = wide(group)

    def softmax(x: Array) -> Array:
        raised = np.exp(x - x.max(axis=-1, keepdims=True))
        return raised / raised.sum(axis=-1, keepdims=True) + 1e-8

    if seed.ndim == 0:
        return expert
    p, q = softmax(expert), softmax(seed)
    importance = np.abs(expert - seed) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    order = np.sort(importance.ravel())
    low, middle, high = (order[int(share * (order.size - 1))] for share in (0.25, 0.5, 0.75))
    return seed + (expert - seed) * (importance >= middle + 1.5 * (high - low) - 1e-9)


def naive_ram(group: TensorGroup, r: float = 0.0, alpha: float = 0.0) -> Array:
    seed, experts, _ = wide(group)
    deltas = [(x.astype("f4") - seed.astype("f4")).astype("f8") for x in experts]
    changed = np.stack([np.abs(delta) > 0.3 for delta in deltas])
    count = changed.sum(axis=0)
    mix = np.zeros_like(seed)
    for delta, mask in zip(deltas, changed, strict=True):
        shared, unique = (mask & (count > 1)).sum(), (mask & (count == 1)).sum()
        factor = 1 + r * min(shared / unique, alpha) if unique else 1.0
        mix = mix + np.where(count == 1, factor, 1 / np.maximum(count, 1)) * mask * delta
    return seed + mix


THREE = (0.5, 1.25, 2.0)
CASES: list[tuple[str, dict[str, Any], Callable[[TensorGroup], Array], int, tuple[float, ...]]] = [
    ("linear", {}, naive_linear, 3, THREE),
    ("average", {}, naive_linear, 3, (0.2, 0.3, 0.5)),
    ("average", {}, naive_linear, 3, (1 / 3, 1 / 3, 1 / 3)),
    ("task_arithmetic", {"lambda": 0.7}, naive_task_arithmetic, 3, (0.5, -1.0, 2.0)),
    ("ties", {"density": 0.3, "lambda": 0.5}, naive_ties, 3, THREE),
    ("dare_linear", {"density": 0.4, "random_seed": 3}, naive_dare_linear, 3, THREE),
    ("dare_ties", {"density": 0.4, "rescale": "l1", "normalize": True}, naive_dare_l1, 3, THREE),
    ("della", {"density": 0.5, "epsilon": 0.1}, naive_della, 3, THREE),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.1}, naive_breadcrumbs, 3, THREE),
    ("sce", {}, naive_sce, 3, THREE),
    ("model_stock", {}, naive_model_stock, 3, THREE),
    ("ram", {"epsilon": 0.3}, naive_ram, 3, THREE),
    ("ramplus_tl", {"epsilon": 0.3, "r": 0.5, "alpha": 2}, lambda group: naive_ram(group, 0.5, 2), 3, THREE),
    ("ramplus_tl", {"epsilon": 0.3, "r": 0.5, "alpha": 0.4}, lambda group: naive_ram(group, 0.5, 0.4), 3, THREE),
    ("nearswap", {"t": 0.1}, naive_nearswap, 1, (1.0,)),
    ("slerp", {"t": 0.3}, naive_slerp, 2, (1.0, 1.0)),
    ("nuslerp", {"nuslerp_flatten": False, "task_vectors": True}, naive_nuslerp_rows, 2, (1.0, 3.0)),
    ("karcher", {"max_iter": 100, "tol": 1e-9}, naive_karcher, 3, THREE),
    ("multislerp", {"task_vectors": True}, naive_multislerp, 3, THREE),
    ("arcee_fusion", {}, naive_arcee_fusion, 1, (1.0,)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "values", "naive", "count", "weights"), CASES, ids=lambda value: str(value)[:24])
def test_a_method_equals_its_definition(
    name: str,
    values: dict[str, Any],
    naive: Callable[[TensorGroup], Array],
    count: int,
    weights: tuple[float, ...],
    shape: tuple[int, ...],
) -> None:
    method = installed_plugins().offer(MergeMethod, name)
    assert isinstance(method, TensorMerge)
    options = parse_options(method.options, values, name)
    group = group_of(shape, count, weights)
    expected = naive(group)
    merged = np.asarray(method.merge(in_numpy(group), options))
    in_torch = method.merge(group, options).numpy()
    assert merged.dtype == np.float32
    assert merged.shape == expected.shape
    np.testing.assert_allclose(merged, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(in_torch, merged, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_opposed_task_vectors_is_the_seed(filter_wise: bool) -> None:
    method = installed_plugins().offer(MergeMethod, "model_stock")
    assert isinstance(method, TensorMerge)
    group = group_of((6, 8), 3, (1.0, 1.0, 1.0))
    step = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    opposed = replace(group, experts=(group.seed + step, group.seed - 0.9 * step, group.seed - step))
    options = parse_options(method.options, {"filter_wise": filter_wise}, "model_stock")
    for given in (opposed, in_numpy(opposed)):
        np.testing.assert_allclose(np.asarray(method.merge(given, options)), group.seed.numpy(), atol=1e-6)


def test_fisher_weighs_every_element_by_its_information() -> None:
    information = tuple(torch.rand(30, 4, generator=torch.Generator().manual_seed(n)) for n in range(2))
    group = group_of((30, 4), 2, (0.25, 0.75), statistics=information)
    method = installed_plugins().offer(MergeMethod, "fisher")
    assert isinstance(method, TensorMerge)
    _, experts, weights = wide(group)
    counts = [w * f.double().numpy() for w, f in zip(weights, information, strict=True)]
    expected = sum(c * x for c, x in zip(counts, experts, strict=True)) / sum(counts)
    for given in (group, in_numpy(group)):
        merged = method.merge(given, parse_options(method.options, {}, "fisher"))
        np.testing.assert_allclose(np.asarray(merged), expected, rtol=1e-5, atol=1e-6)


def test_regmean_is_the_least_squares_fit_of_every_experts_outputs() -> None:
    """With scale 1 it minimises sum_i |X_i W^T - X_i W_i^T|^2: numpy's own solver on the stacked inputs agrees."""
    source = np.random.default_rng(0)
    inputs = [source.standard_normal((40, 6)) @ source.standard_normal((6, 6)) for _ in range(2)]
    grams = tuple(torch.tensor(x.T @ x / len(x), dtype=torch.float32) for x in inputs)
    group = group_of((5, 6), 2, (0.5, 0.5), statistics=grams)
    _, experts, _ = wide(group)
    stacked = np.vstack(inputs)
    wanted = np.vstack([x @ w.T for x, w in zip(inputs, experts, strict=True)])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    method = installed_plugins().offer(MergeMethod, "regmean")
    assert isinstance(method, TensorMerge)
    options = parse_options(method.options, {"scale": 1.0, "ridge": 0.0}, "regmean")
    for given in (group, in_numpy(group)):
        np.testing.assert_allclose(np.asarray(method.merge(given, options)), expected, rtol=1e-3, atol=1e-4)


def test_regmean_averages_tensors_outside_linear_layers() -> None:
    group = group_of((7,), 2, (0.25, 0.75), statistics=(None, None))
    method = installed_plugins().offer(MergeMethod, "regmean")
    assert isinstance(method, TensorMerge)
    merged = method.merge(group, parse_options(method.options, {}, "regmean"))
    torch.testing.assert_close(merged, 0.25 * group.experts[0] + 0.75 * group.experts[1])


def test_della_keeps_large_changes_more_often() -> None:
    chances = keep_probabilities(np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]], dtype="f4"), 0.5, 0.2)
    np.testing.assert_allclose(chances, [[0.7, 0.3, 0.5], [0.3, 0.7, 0.5]], rtol=1e-6)
