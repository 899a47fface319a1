"""Evaluation by several processes, which take turns with the batches of all texts.

A process keeps the model that it loaded last. It takes up the next model that no process has begun; once there is none, it
helps with the model that has the fewest processes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from ...core.errors import UserError
from ...core.hooks.evaluation import Division, Score
from ...core.models.loading import load_network
from ...core.models.scoring import begin_text, learns_from_text
from ...core.process.compute import available_cores, best_device
from ...core.process.workers import Worker, require_cores, with_workers
from ...core.reporting import SILENT, Reporter
from ...core.text.token_store import TokenWindows

BATCHES = 8
"""Batches that a process takes at a time."""


@dataclass(frozen=True)
class EvaluationJob:
    """Models and the texts that they are scored on."""

    models: Mapping[str, Path]
    windows: Mapping[tuple[str, str], TokenWindows]
    """(model, domain) -> text."""
    known_domains: bool = False
    """Whether ensembles are told which domain they read."""

    @property
    def num_windows(self) -> int:
        return sum(map(len, self.windows.values()))


@dataclass(frozen=True)
class Piece:
    """Consecutive batches of one text, for one model."""

    model: str
    domain: str
    begin: int
    """Number of the first batch."""
    end: int
    """Number of the batch after the last."""
    num_windows: int


@dataclass(frozen=True)
class Opened:
    """What a process finds out when it has loaded a model."""

    pieces: tuple[Piece, ...]
    knows_domains: bool
    """Whether the model has weights of its own for one of the domains."""


def require_devices(nproc: int) -> None:
    """Raise `UserError` if there are GPUs, but fewer than processes, or too few CPU cores."""
    import torch

    require_cores(nproc)
    if torch.cuda.is_available() and nproc > torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise UserError(f"each of {nproc} processes needs a GPU, and this machine has {gpus}; give at most {gpus}")


def score_in_processes(
    job: EvaluationJob, division: Division, nproc: int, reporter: Reporter = SILENT
) -> tuple[dict[str, dict[str, Score]], bool]:
    """Return the scores, model -> domain -> score, and whether a model has weights of its own for one of the domains.

    The scores do not depend on the number of processes. Raises `UserError` if a process ends or cannot load a model.
    """
    threads = max(available_cores() // nproc, 1)
    schedule = _Schedule(job, reporter)

    def start(number: int) -> Worker:
        return Worker(f"evaluation process {number + 1} of {nproc}", answer_pieces, (job, division, number, threads))

    with_workers(nproc, start, schedule.work)
    scores: dict[str, dict[str, Score]] = {model: {} for model in job.models}
    for (model, domain), windows in job.windows.items():
        parts = schedule.measured[model, domain]
        partials = [partial for begin in sorted(parts) for partial in parts[begin]]
        scores[model][domain] = division.merge_scores(windows, partials)
    return scores, schedule.knows_domains


class _Schedule:
    """Hands out models and pieces to the threads that speak to the processes, and collects what they measure."""

    def __init__(self, job: EvaluationJob, reporter: Reporter) -> None:
        self.measured: dict[tuple[str, str], dict[int, list[Any]]] = {key: {} for key in job.windows}
        """(model, domain) -> first batch of a piece -> partial results."""
        self.knows_domains = False
        self._reporter = reporter
        self._pieces: dict[str, deque[Piece] | None] = dict.fromkeys(job.models)
        """Model -> pieces that no process has begun; None before the model was opened."""
        self._helpers: Counter[str] = Counter()
        self._num_done, self._num_windows = 0, job.num_windows
        self._lock = Lock()

    def work(self, worker: Worker) -> bool:
        """Let a process score what is left to begin; return whether all is done."""
        while (model := self._choose()) is not None:
            self._open(model, worker.ask(model))
            while (piece := self._take(model)) is not None:
                self._add(piece, worker.ask(piece))
        return self._num_done == self._num_windows

    def _choose(self) -> str | None:
        with self._lock:
            begun = [model for model, pieces in self._pieces.items() if pieces is None or pieces]
            if not begun:
                return None
            model = min(begun, key=lambda name: self._helpers[name])
            self._helpers[model] += 1
            return model

    def _open(self, model: str, opened: Opened) -> None:
        with self._lock:
            self.knows_domains |= opened.knows_domains
            if self._pieces[model] is None:
                self._pieces[model] = deque(opened.pieces)

    def _take(self, model: str) -> Piece | None:
        with self._lock:
            pieces = self._pieces[model]
            if pieces:
                return pieces.popleft()
            self._helpers[model] -= 1
            return None

    def _add(self, piece: Piece, partials: list[Any]) -> None:
        with self._lock:
            self.measured[piece.model, piece.domain][piece.begin] = partials
            self._num_done += piece.num_windows
            self._reporter.progress("evaluating", self._num_done, self._num_windows, "windows")


def answer_pieces(
    job: EvaluationJob, division: Division, number: int, threads: int
) -> Callable[[str | Piece], Opened | list[Any]]:
    """Return what a process answers: to the name of a model what its pieces are, to a piece its partial results."""
    import torch

    torch.set_num_threads(threads)
    device = f"cuda:{number}" if best_device() == "cuda" else "cpu"
    network: Any = None
    domains = [domain for model, domain in job.windows if model == next(iter(job.models))]

    def opened(model: str) -> Opened:
        nonlocal network
        network = None  # before the next one is loaded
        network = load_network(job.models[model], dtype="float32").to(device)
        pieces: list[Piece] = []
        for domain in domains:
            windows = job.windows[model, domain]
            size = division.batch_size(network, windows)
            num_batches = -(-len(windows) // size)
            each = num_batches if learns_from_text(network) else BATCHES
            for begin in range(0, num_batches, each):
                end = min(begin + each, num_batches)
                num_windows = min(end * size, len(windows)) - begin * size
                pieces.append(Piece(model, domain, begin, end, num_windows))
        told = [begin_text(network, domain if job.known_domains else None) for domain in domains]
        return Opened(tuple(pieces), any(told))

    def answer(task: str | Piece) -> Opened | list[Any]:
        if isinstance(task, str):
            return opened(task)
        begin_text(network, task.domain if job.known_domains else None)
        return division.partials(network, job.windows[task.model, task.domain], task.begin, task.end)

    return answer
