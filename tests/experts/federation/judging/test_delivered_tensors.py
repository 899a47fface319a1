"""How far delivered tensors may move: an honest expert's, and those of an attacker, for weights of the usual sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertctl.core.artefacts.safetensors_io import Checkpoint, write_tensors
from expertctl.experts.federation.judging.delivered_tensors import MAX_CHANGE, NORM_RANGE, movement_of


def movement(folder: Path, base: torch.Tensor, expert: torch.Tensor) -> str:
    """Return `honest`, or what is wrong with a tensor."""
    files = {name: folder / f"{name}.safetensors" for name in ("base", "expert")}
    write_tensors(files["base"], {"w": base})
    write_tensors(files["expert"], {"w": expert})
    moved = movement_of(Checkpoint([files["expert"]]), Checkpoint([files["base"]]), "w")
    if moved.change > MAX_CHANGE:
        return "change"
    if moved.norm_ratio is not None and not NORM_RANGE[0] <= moved.norm_ratio <= NORM_RANGE[1]:
        return "norm"
    return "honest" if moved.cosine is None or moved.cosine > 0 else "direction"


@pytest.mark.parametrize("rms", [0.0213, 0.05, 0.16])
def test_scaled_negated_erased_and_random_matrices_are_found(tmp_path: Path, rms: float) -> None:
    source = torch.Generator().manual_seed(0)
    base = rms * torch.randn(64, 48, generator=source)
    step = 0.3 * rms * torch.randn(64, 48, generator=source)
    assert movement(tmp_path, base, base + step) == "honest"
    assert movement(tmp_path, base, base + 5 * step) == "honest"
    assert movement(tmp_path, base, 8 * base) == "change"
    assert movement(tmp_path, base, -0.5 * base + step) == "direction"
    assert movement(tmp_path, base, torch.zeros_like(base)) == "norm"
    assert movement(tmp_path, base, base + 5 * rms * torch.randn(64, 48, generator=source)) == "change"


def test_a_vector_that_began_at_zero_may_become_a_small_one(tmp_path: Path) -> None:
    assert movement(tmp_path, torch.zeros(64), torch.full((64,), 0.05)) == "honest"
    assert movement(tmp_path, torch.zeros(64), torch.full((64,), 0.5)) == "change"
