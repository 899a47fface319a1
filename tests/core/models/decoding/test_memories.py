"""Interpolation with neighbours in log space, joined memories, and fitting, against plain sums."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_workspaces import write_memory

from expertctl.core.models.decoding.memories.indexing import resolve_index
from expertctl.core.models.decoding.memories.interpolation import interpolate, neighbour_log_probs
from expertctl.core.models.decoding.memories.manifest import IndexRecord
from expertctl.core.models.decoding.memories.search import Datastore, Neighbours, search_all
from expertctl.experts.memories.fitting import best_interpolation


def open_memory(folder: Path, keys: np.ndarray, values: list[int]) -> Datastore:
    return Datastore(write_memory(folder, keys, values))


def test_tokens_beyond_16_bits_are_read_as_they_were_written(tmp_path: Path) -> None:
    store = open_memory(tmp_path / "m", np.eye(3), [32_768, 70_000, 2**31 - 1])
    found = store.search(torch.eye(3), 1)
    assert found.tokens[:, 0].tolist() == [32_768, 70_000, 2**31 - 1]
    assert found.distances[:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("k", [1, 5, 12, 100])
def test_joined_memories_are_one(tmp_path: Path, k: int) -> None:
    random = np.random.default_rng(0)
    keys = random.standard_normal((12, 4)).astype(np.float16)
    whole = open_memory(tmp_path / "whole", keys, list(range(12)))
    parts = [
        open_memory(tmp_path / f"{begin}", keys[begin : begin + 5], list(range(12))[begin : begin + 5])
        for begin in (0, 5, 10)
    ]
    queries = torch.from_numpy(random.standard_normal((40, 4)).astype(np.float32))
    joined, expected = search_all(parts, queries, k), whole.search(queries, k)
    assert torch.equal(joined.tokens, expected.tokens)
    assert torch.equal(joined.distances, expected.distances)


def test_probabilities_of_equal_tokens_are_added() -> None:
    neighbours = Neighbours(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[2, 0, 2]]))
    weights = [math.exp(0), math.exp(-0.5), math.exp(-1.5)]
    expected = torch.tensor([[weights[1], 0, weights[0] + weights[2], 0]]) / sum(weights)
    torch.testing.assert_close(neighbour_log_probs(neighbours, 2.0, 4).exp().float(), expected)


def test_far_neighbours_do_not_underflow() -> None:
    neighbours = Neighbours(torch.tensor([[1e6, 1e6 + 5000]]), torch.tensor([[1, 3]]))
    log_probs = neighbour_log_probs(neighbours, 1.0, 4)
    assert log_probs[0, 1] == 0
    assert log_probs[0, 3] == -5000
    mixed = interpolate(torch.full((1, 4), -2000.0), neighbours, 1.0, 1.0)
    assert mixed[0].tolist() == [-math.inf, 0, -math.inf, -5000]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_without_neighbours_the_model_decides(weight: float) -> None:
    nothing = Neighbours(torch.full((1, 2), math.inf), torch.zeros(1, 2, dtype=torch.long))
    model = torch.randn(1, 5).log_softmax(-1)
    torch.testing.assert_close(interpolate(model, nothing, weight, 1.0), model)


def test_a_place_without_a_neighbour_counts_for_nothing() -> None:
    model = torch.randn(1, 5).log_softmax(-1)
    some = Neighbours(torch.tensor([[2.0, math.inf]]), torch.tensor([[3, 0]]))
    alone = Neighbours(some.distances[:, :1], some.tokens[:, :1])
    torch.testing.assert_close(interpolate(model, some, 0.4, 1.0), interpolate(model, alone, 0.4, 1.0))


def test_the_fit_is_the_best_of_a_grid() -> None:
    torch.manual_seed(0)
    distances = torch.rand(400, 6) * 4
    matches = (torch.rand(400, 6) < torch.exp(-distances)).long()
    log_probs = torch.rand(400).log()
    weight, temperature, bits, plain = best_interpolation(Neighbours(distances, matches), log_probs)
    assert plain == pytest.approx(-float(log_probs.double().mean()) / math.log(2))
    shares = ((-distances.double() / temperature).softmax(1) * matches).sum(1)

    def loss(other: float) -> float:
        return -float((other * shares + (1 - other) * log_probs.double().exp()).log2().mean())

    assert bits == pytest.approx(loss(weight))
    assert all(bits <= loss(other / 100) + 1e-6 for other in range(100))


def test_a_memory_that_does_not_help_gets_no_weight() -> None:
    found = Neighbours(torch.rand(50, 3), torch.zeros(50, 3, dtype=torch.long))
    weight, _, bits, plain = best_interpolation(found, torch.rand(50).log())
    assert weight == pytest.approx(0, abs=1e-6)
    assert bits == pytest.approx(plain)


def test_the_index_depends_on_the_number_of_keys() -> None:
    pytest.importorskip("faiss")
    assert resolve_index(None, None, 1000, 128) == IndexRecord("exact")
    million = resolve_index(None, None, 1_000_000, 128)
    assert (million.kind, million.lists) == ("ivf", 4000)
    assert resolve_index("ivf", None, 10, 128).lists == 1
