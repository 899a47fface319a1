"""Extracts a LoRA adapter from two checkpoints: the best low-rank approximation of their difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.artefacts.files import new_folder, write_json, write_text
from ..core.artefacts.safetensors_io import torch_dtype, write_tensors
from ..core.errors import UserError
from ..core.models.adapters.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..core.models.stored_names import loaded_names
from ..core.reporting import SILENT, Reporter, reported
from .engine.reading import Reader
from .recipes.parameters import matches
from .sources.models import Source, StoredTensor, open_source
from .sources.tensor_names import HEADS, TOKEN_EMBEDDINGS

_WEIGHT = ".weight"


@dataclass(frozen=True)
class TensorExtraction:
    """Approximation of one matrix."""

    name: str
    rank: int
    error: float
    """Relative error |dW - BA| / |dW| in the Frobenius norm."""


@dataclass(frozen=True)
class ExtractionReport:
    """Contents and approximation error of an extracted adapter."""

    tensors: tuple[TensorExtraction, ...]
    error: float
    """Relative error over all matrices together."""
    saved_whole: tuple[str, ...]
    """Changed tensors that are stored in full."""
    left_out: tuple[str, ...]
    """Changed tensors that are not in the adapter."""


def extract_adapter(
    base: Path,
    model: Path,
    output: Path,
    *,
    rank: int | None = 16,
    energy: float | None = None,
    targets: str = "*",
    save_rest: bool = False,
    dtype: str = "F32",
    force: bool = False,
    reporter: Reporter = SILENT,
) -> ExtractionReport:
    """Write a PEFT LoRA folder with an adapter that approximates `model` on top of `base`.

    The change of every linear layer that `targets` matches is approximated by a truncated singular value decomposition:
    with `rank` singular values, or with the smallest number whose squares sum to the share `energy`. Other changed
    tensors are stored in full with `save_rest`, and left out otherwise. Raises `UserError` if the models have different
    tensors or nothing changed.
    """
    if (rank is None) == (energy is None):
        raise UserError("give either a rank or the share of energy to keep")
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}; it must be 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy is {energy}; it must be greater than 0 and at most 1")
    base_source = open_source("base", base)
    model_source = open_source("model", model, base_source)
    names = _changed_names(base_source, model_source)
    in_memory = _names_in_memory(base_source)
    targeted = [name for name in names if name in in_memory and _is_target(name, model_source.tensors[name], targets)]
    factors: dict[str, Tensor] = {}
    extractions: list[TensorExtraction] = []
    squared_error = squared_norm = 0.0
    with Reader() as reader:

        def difference(name: str) -> Any:
            return reader.read(model_source.tensors[name]).astype("f8") - reader.read(base_source.tensors[name])

        for name in reported(targeted, reporter, "extracting", "matrices"):
            delta = difference(name)
            squares = float((delta**2).sum())
            if squares > 0:
                b, a, error = _factorise(delta, rank, energy)
                module = in_memory[name].removesuffix(_WEIGHT)
                factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
                extractions.append(TensorExtraction(in_memory[name], a.shape[0], error))
                squared_error, squared_norm = squared_error + error**2 * squares, squared_norm + squares
        others = [name for name in names if name not in targeted and float(abs(difference(name)).max()) > 0]
        saved = {
            in_memory[name]: torch.from_numpy(reader.read(model_source.tensors[name]))
            for name in (others if save_rest else ())
            if name in in_memory
        }
    if not extractions and not saved:
        raise UserError(f"nothing to extract: {model} and {base} have the same tensors in '{targets}'")
    report = ExtractionReport(
        tuple(extractions),
        math.sqrt(squared_error / squared_norm) if squared_norm else 0.0,
        tuple(saved),
        tuple(name for name in others if in_memory.get(name) not in saved),
    )
    with new_folder(output, force=force, what="adapter") as partial:
        _write(partial, base, factors | saved, report, dtype)
    return report


def _changed_names(base: Source, model: Source) -> list[str]:
    """Return the tensors that may differ; raises `UserError` if names or shapes differ."""
    for name in {*base.tensors, *model.tensors}:
        base_tensor, model_tensor = base.tensors.get(name), model.tensors.get(name)
        if base_tensor is None or model_tensor is None:
            present, absent = (base, model) if model_tensor is None else (model, base)
            raise UserError(f"tensor '{name}' is in {present.folder}, but not in {absent.folder}")
        if base_tensor.shape != model_tensor.shape:
            raise UserError(
                f"tensor '{name}' is {list(model_tensor.shape)} in {model.folder}, but {list(base_tensor.shape)} in {base.folder}"
            )
    return [name for name, tensor in model.tensors.items() if tensor != base.tensors[name]]


def _names_in_memory(base: Source) -> dict[str, str]:
    """Return the names in memory, which adapters have, of the tensors that are not only a part of one in memory."""
    loaded = loaded_names(base.model_folder, base.tensors)
    names = {name: loaded.get(name, (name, True)) for name in base.tensors}
    return {name: memory for name, (memory, is_whole) in names.items() if is_whole}


def _is_target(name: str, tensor: StoredTensor, targets: str) -> bool:
    is_linear = len(tensor.shape) == 2 and name.endswith(_WEIGHT) and not name.endswith(TOKEN_EMBEDDINGS)
    return is_linear and (name in HEADS or "norm" not in name) and matches(targets, name)


def _factorise(delta: Any, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """Return B (out, r), A (r, in) and the relative error of their product, minimal for rank r (Eckart-Young)."""
    left, values, right = torch.linalg.svd(torch.from_numpy(delta), full_matrices=False)
    squares = values**2
    total = float(squares.sum())
    if rank is None:
        reached = squares.cumsum(0) >= (energy or 1.0) * total * (1 - 1e-12)
        rank = int(reached.nonzero()[0]) + 1 if bool(reached.any()) else len(squares)
    num_kept = min(rank, len(values))
    root = values[:num_kept].sqrt()
    error = math.sqrt(max(float(squares[num_kept:].sum()), 0.0) / total)
    return (left[:, :num_kept] * root).float(), (root[:, None] * right[:num_kept]).float(), error


def _write(folder: Path, base: Path, tensors: Mapping[str, Tensor], report: ExtractionReport, dtype: str) -> None:
    kind = torch_dtype(dtype)
    write_tensors(
        folder / ADAPTER_WEIGHTS,
        {f"base_model.model.{name}": tensor.to(kind).contiguous() for name, tensor in tensors.items()},
    )
    ranks = {matrix.name.removesuffix(_WEIGHT): matrix.rank for matrix in report.tensors}
    largest_rank = max(ranks.values(), default=1)
    other_ranks = {module: rank for module, rank in ranks.items() if rank != largest_rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": largest_rank,
        "lora_alpha": largest_rank,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_ranks,
        "target_modules": sorted(ranks) or None,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in report.saved_whole}) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
    }
    write_json(folder / ADAPTER_CONFIG, config)
    write_text(folder / "README.md", _card(base, report))


def _card(base: Path, report: ExtractionReport) -> str:
    return (
        f"---\nlibrary_name: peft\nbase_model: {base.name}\ntags: [lora, expertctl]\n---\n\n"
        f"# LoRA extracted from a full model\n\nIts {len(report.tensors)} matrices approximate the change of the full model "
        f"with a relative error of {report.error:.2%} (Frobenius norm). Stored in full: {len(report.saved_whole)} tensors; "
        f"changed, but left out: {len(report.left_out)}.\n"
    )
