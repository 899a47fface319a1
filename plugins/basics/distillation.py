"""The objective `distil`: a model learns the next-token distributions of another one, such as an ensemble.

The loss is `hard` times the cross-entropy of the text, plus the rest times temperature^2 KL(teacher || student) of both
distributions at a temperature (Hinton et al., arXiv:1503.02531, section 2). Shapes: N = targets that count, V = vocabulary,
K = `top_k`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.safetensors_io import write_tensors
from ...core.errors import UserError
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least, check_positive, check_range
from ...core.hooks.steps import Batch, Loss, Objective, ObjectiveContext, TrainingObjective

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DistilOptions:
    """Options of `distil`."""

    teacher: str = ""
    """Model to learn from: the name of a seed, expert or generalist of the project, or a folder."""
    temperature: float = 1.0
    """Divides the logits of both models."""
    hard: float = 0.0
    """Share of the cross-entropy of the text in the loss."""
    top_k: int | None = None
    """Number of the teacher's most probable tokens that are told apart; all others are one outcome. Their probabilities are
    kept on disk, so that the teacher reads each block once. None: all tokens, nothing is kept."""

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_range("hard", self.hard, 0, 1)
        if self.top_k is not None:
            check_at_least("top_k", self.top_k, 1)


@hookimpl
def objectives() -> list[Objective]:
    """Return the objective."""
    summary = "the next-token distributions of another model (knowledge distillation)"
    return [Objective("distil", summary, prepare, DistilOptions, models=teachers)]


def teachers(options: DistilOptions) -> tuple[str, ...]:
    """Return the name of the teacher; raises `UserError` without one."""
    if not options.teacher:
        raise UserError("objective 'distil' needs a teacher; set objective_options: {teacher: NAME}")
    return (options.teacher,)


def prepare(context: ObjectiveContext) -> TrainingObjective:
    """Load the teacher; raises `UserError` for one with another number of tokens, or another tokenizer."""
    options: DistilOptions = context.options
    teacher = context.open_model(options.teacher)
    if teacher.config.vocab_size != context.model.config.vocab_size:
        raise UserError(
            f"teacher '{options.teacher}' predicts {teacher.config.vocab_size} tokens, and the trained model "
            f"{context.model.config.vocab_size}; name a teacher of the same vocabulary"
        )
    return Distillation(teacher, options, context.cache)


class Distillation(TrainingObjective):
    """The loss of a student, with its teacher."""

    def __init__(self, teacher: PreTrainedModel, options: DistilOptions, cache: Path) -> None:
        self._teacher = teacher.eval().requires_grad_(False)
        self._options = options
        self._top_k = options.top_k if options.top_k is not None and options.top_k < teacher.config.vocab_size else None
        self._kept = KeptPredictions(cache, self._top_k) if self._top_k is not None else None

    def loss(self, forward: Callable[..., Any], batch: Batch, next_token: Loss) -> Tensor:
        """Return the mean over the targets that count, in nats per token."""
        import torch
        from torch.nn import functional as F

        counts = torch.ones_like(batch.tokens[:, 1:], dtype=torch.bool) if batch.counted is None else batch.counted
        student_NV = forward(**batch.inputs).logits[counts].float()
        number = max(len(student_NV), 1)
        temperature, hard = self._options.temperature, self._options.hard
        softened_NV = F.log_softmax(student_NV / temperature, dim=-1)
        if self._kept is None:
            teacher_NV = self._log_probs(batch)[counts]
        else:
            ids_NK, top_NK = (part[counts] for part in self._kept.of(batch, self._log_probs))
            teacher_NV = _with_rest(top_NK)
            softened_NV = _with_rest(softened_NV.gather(-1, ids_NK))
        divergence = temperature**2 * F.kl_div(softened_NV, teacher_NV, reduction="sum", log_target=True) / number
        if hard == 0:
            return divergence
        truth = F.cross_entropy(student_NV, batch.tokens[:, 1:][counts], reduction="sum") / number
        return hard * truth + (1 - hard) * divergence

    def _log_probs(self, batch: Batch) -> Tensor:
        """Return the teacher's log-probabilities at the temperature, (B, T, V)."""
        import torch

        if self._teacher.device != batch.tokens.device:
            self._teacher.to(batch.tokens.device)
        with torch.no_grad(), torch.autocast(batch.tokens.device.type, enabled=False):
            logits_BTV = self._teacher(**batch.inputs).logits.float()
            return torch.log_softmax(logits_BTV / self._options.temperature, dim=-1)


def _with_rest(log_probs_NK: Tensor) -> Tensor:
    """Return log-probabilities with that of all other outcomes behind them, (N, K + 1)."""
    import torch

    total_N1 = log_probs_NK.exp().sum(dim=-1, keepdim=True).clamp(max=1 - 1e-6)
    return torch.cat((log_probs_NK, torch.log1p(-total_N1)), dim=-1)


class KeptPredictions:
    """A teacher's most probable tokens for blocks that it has read, in a file of each block."""

    def __init__(self, folder: Path, top_k: int) -> None:
        self._folder, self._top_k = folder, top_k

    def of(self, batch: Batch, log_probs: Callable[[Batch], Tensor]) -> tuple[Tensor, Tensor]:
        """Return ids and log-probabilities, (B, T, K) each; `log_probs(batch)` are computed if one of the blocks is new."""
        import torch
        from safetensors.torch import load_file

        paths = [self._path(batch, row) for row in range(len(batch.tokens))]
        if not all(path.is_file() for path in paths):
            top = log_probs(batch).topk(self._top_k, dim=-1)
            for path, ids_TK, values_TK in zip(paths, top.indices, top.values, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(path, {"ids": ids_TK.int().cpu(), "log_probs": values_TK.cpu()})
            return top.indices, top.values
        files = [load_file(path, device=str(batch.tokens.device)) for path in paths]
        return torch.stack([file["ids"].long() for file in files]), torch.stack([file["log_probs"] for file in files])

    def _path(self, batch: Batch, row: int) -> Path:
        content = batch.tokens[row].cpu().numpy().tobytes()
        if batch.positions is not None:
            content += batch.positions[row].cpu().numpy().tobytes()
        name = hashlib.sha256(content).hexdigest()[:32]
        return self._folder / name[:2] / f"{name}.safetensors"
