"""A LoRA adapter out of two checkpoints: the best low-rank factors of what changed between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.artefacts.files import new_folder, write_json, write_text
from ..core.artefacts.safetensors_io import torch_dtype, write_tensors
from ..core.errors import UserError
from .engine.reading import Reader
from .recipes.parameters import matches
from .sources.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .sources.models import Source, StoredTensor, open_source
from .sources.tensor_names import HEADS, TOKEN_EMBEDDINGS

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHT = ".weight"
Tell = Callable[[int], None]


@dataclass(frozen=True)
class TensorExtraction:
    """One matrix of the adapter."""

    name: str
    rank: int
    error: float
    """|dW - BA| / |dW|, Frobenius norms."""


@dataclass(frozen=True)
class ExtractionReport:
    """What an extracted adapter holds, and what it lost."""

    tensors: tuple[TensorExtraction, ...]
    error: float
    """The same over all of them together."""
    saved_whole: tuple[str, ...]
    """Tensors that changed and are kept as they are."""
    left_out: tuple[str, ...]
    """Tensors that changed and are not in the adapter."""


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
    tell: Tell = lambda done: None,
) -> ExtractionReport:
    """Write a PEFT LoRA folder whose adapter turns `base` into `model`, as nearly as its ranks allow.

    Every matrix of a linear layer that `targets` matches and that changed gets the truncated singular value
    decomposition of its change: `rank` singular values, or as many as hold the share `energy` of its squares. What
    else changed is saved whole with `save_rest`, and left out otherwise. Raises `UserError` when the models do not
    fit or nothing changed.
    """
    _check(rank, energy)
    first = open_source("base", base)
    second = open_source("model", model, first)
    names = _changed_names(first, second)
    chosen = [name for name in names if _is_target(name, second.tensors[name], targets)]
    rest = [name for name in names if name not in chosen]
    factors: dict[str, Tensor] = {}
    found: list[TensorExtraction] = []
    lost = whole = 0.0
    with Reader() as reader:
        for number, name in enumerate(chosen, start=1):
            delta = _difference(reader, first, second, name)
            squares = float((delta**2).sum())
            if squares > 0:
                b, a, error = _factorised(delta, rank, energy)
                module = name.removesuffix(_WEIGHT)
                factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
                found.append(TensorExtraction(name, a.shape[0], error))
                lost, whole = lost + error**2 * squares, whole + squares
            tell(number)
        changed_rest = [
            name for name in rest if float(abs(_difference(reader, first, second, name)).max()) > 0
        ]
        saved = {name: _whole(reader, second.tensors[name]) for name in changed_rest} if save_rest else {}
    if not found and not saved:
        raise UserError(f"there is nothing to extract: {model} and {base} are the same in '{targets}'")
    report = ExtractionReport(
        tuple(found),
        math.sqrt(lost / whole) if whole else 0.0,
        tuple(saved),
        () if save_rest else tuple(changed_rest),
    )
    with new_folder(output, force=force, what="adapter") as partial:
        _write(partial, base, factors | saved, report, dtype)
    return report


def _check(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise UserError("give a rank, or the share of energy to keep, and not both")
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}; it is 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy is {energy}; it is more than 0 and at most 1")


def _changed_names(base: Source, model: Source) -> list[str]:
    """Return the tensors that may differ; raises `UserError` where the two models do not fit."""
    for name in {*base.tensors, *model.tensors}:
        ours, theirs = base.tensors.get(name), model.tensors.get(name)
        if ours is None or theirs is None:
            there, absent = (base, model) if theirs is None else (model, base)
            raise UserError(f"tensor '{name}' is in {there.folder}, but not in {absent.folder}")
        if ours.shape != theirs.shape:
            raise UserError(
                f"tensor '{name}' is {list(theirs.shape)} in {model.folder}, but {list(ours.shape)} in {base.folder}"
            )
    return [name for name, one in model.tensors.items() if one != base.tensors[name]]


def _is_target(name: str, one: StoredTensor, targets: str) -> bool:
    is_linear = len(one.shape) == 2 and name.endswith(_WEIGHT) and not name.endswith(TOKEN_EMBEDDINGS)
    return is_linear and (name in HEADS or "norm" not in name) and matches(targets, name)


def _difference(reader: Reader, base: Source, model: Source, name: str) -> Any:
    return reader.whole(model.tensors[name]).astype("f8") - reader.whole(base.tensors[name])


def _whole(reader: Reader, one: StoredTensor) -> Tensor:
    import torch

    return torch.from_numpy(reader.whole(one).copy())


def _factorised(delta: Any, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """Return B (out, r), A (r, in) and the relative error of their product (Eckart-Young: none of that rank is less)."""
    import torch

    left, values, right = torch.linalg.svd(torch.from_numpy(delta), full_matrices=False)
    squares = values**2
    total = float(squares.sum())
    kept = rank if rank is not None else _rank_for(squares, total, energy or 1.0)
    kept = min(kept, len(values))
    root = values[:kept].sqrt()
    error = math.sqrt(max(float(squares[kept:].sum()), 0.0) / total)
    return (left[:, :kept] * root).float(), (root[:, None] * right[:kept]).float(), error


def _rank_for(squares: Tensor, total: float, energy: float) -> int:
    reached = squares.cumsum(0) >= energy * total * (1 - 1e-12)
    return int(reached.nonzero()[0]) + 1 if bool(reached.any()) else len(squares)


def _write(
    folder: Path, base: Path, tensors: Mapping[str, Tensor], report: ExtractionReport, dtype: str
) -> None:
    kind = torch_dtype(dtype)
    write_tensors(
        folder / ADAPTER_WEIGHTS,
        {f"base_model.model.{name}": tensor.to(kind).contiguous() for name, tensor in tensors.items()},
    )
    ranks = {one.name.removesuffix(_WEIGHT): one.rank for one in report.tensors}
    common = max(ranks.values(), default=1)
    special = {module: rank for module, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": special,
        "alpha_pattern": special,
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
        f"# LoRA extracted from a full model\n\nIts {len(report.tensors)} products differ from what changed in the full "
        f"model by {report.error:.2%} of it (Frobenius norm). Saved whole: {len(report.saved_whole)} tensors; changed "
        f"and left out: {len(report.left_out)}.\n"
    )
