"""What this machine has room for: runs at a time, a share of the GPUs for each, and the memory that they need."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

from ....core.artefacts.files import read_json
from ....core.artefacts.layout import Layout
from ....core.artefacts.safetensors_io import Checkpoint
from ....core.errors import UserError
from ....core.hooks.manager import installed_plugins
from ....core.hooks.training import Trainer
from ....core.manifests.run import RunSpec, read_run
from ....core.process.compute import available_cores
from ....core.process.memory import available_memory
from ....experts.runs.trainable import changeable_tensors, trainer_for
from .options import LocalOptions


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(chosen.split(",") if chosen else map(str, range(count)))[:count]


def shared_gpus(runs: Sequence[Path], jobs: int, options: LocalOptions) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES for each of the runs that train at a time; None where users choose a GPU themselves."""
    has_choice = any(":" in spec.training.device for spec in _readable(runs).values())
    return gpu_shares(() if has_choice or jobs == 1 else visible_gpus(), jobs, options.nproc)


def gpu_shares(gpus: Sequence[str], jobs: int, nproc: int) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES for each of the runs that train at a time; None leaves all GPUs to a run.

    Each gets `nproc` GPUs of its own as far as they go round; then runs share them.
    """
    if not gpus:
        return [None] * jobs
    groups = [gpus[begin : begin + nproc] for begin in range(0, len(gpus) - nproc + 1, nproc)] or [gpus]
    return [",".join(groups[number % len(groups)]) for number in range(jobs)]


def fitting_jobs(runs: Sequence[Path], options: LocalOptions) -> int:
    """Return how many of the runs can train at a time without sharing a core or a GPU, and within the memory; at least 1."""
    specs = _readable(runs)
    gpus = visible_gpus()
    threads = max((spec.training.threads for spec in specs.values()), default=1)
    limits = [len(runs), available_cores() // (threads * options.nproc)]
    if any(_uses_gpu(spec, gpus) for spec in specs.values()):
        limits.append(len(gpus) // options.nproc)
    available = available_memory()
    need = max((memory_need(run, spec, gpus, options) for run, spec in specs.items()), default=0)
    if available is not None and need:
        limits.append(available // need)
    return max(min(limits), 1)


def memory_problems(runs: Sequence[Path], jobs: int, options: LocalOptions) -> tuple[dict[Path, str], str | None]:
    """Return an error for every run that cannot fit into memory, and a warning if the others cannot at the same time."""
    available = available_memory()
    if available is None or not options.check_memory:
        return {}, None
    gpus = visible_gpus()
    needs = {run: memory_need(run, spec, gpus, options) for run, spec in _readable(runs).items()}
    errors = {
        run: f"training needs at least {_gigabytes(need)} of memory for weights, gradients and optimiser, and "
        f"{_gigabytes(available)} are available; train fewer parameters (trains), or free memory (--launcher-option "
        "check_memory=false tries all the same)"
        for run, need in needs.items()
        if need > available
    }
    at_a_time = sorted(need for run, need in needs.items() if run not in errors)[-jobs:]
    if sum(at_a_time) <= available:
        return errors, None
    return errors, (
        f"{len(at_a_time)} runs at a time may need {_gigabytes(sum(at_a_time))} of memory or more, and "
        f"{_gigabytes(available)} are available; lower --jobs if they are killed"
    )


def _readable(runs: Sequence[Path]) -> dict[Path, RunSpec]:
    """Return the specifications of runs; of a damaged one, its worker says what is wrong."""
    specs = {}
    for run in runs:
        with contextlib.suppress(UserError):
            specs[run] = read_run(run)
    return specs


def memory_need(run: Path, spec: RunSpec, gpus: Sequence[str], options: LocalOptions) -> int:
    """Return a lower bound on a run's memory on this machine, in bytes: 0 on a GPU, or if the model is made by the run.

    Each process loads the weights in float32, or its part of them; gradients and two moments of the trained tensors follow.
    """
    if _uses_gpu(spec, gpus) or spec.kind == "seed":
        return 0
    layout = Layout.find(run)
    try:
        base = layout.seed if spec.base in (None, "seed") else layout.artefact(spec.base)
        sizes = {name: 4 * prod(shape) for name, (_, shape) in Checkpoint.of_folder(base).shapes().items()}
        trained = sum(sizes[name] for name in _trained(spec, base, sizes))
    except UserError:  # a damaged or missing model, of which its worker says more
        return 0
    replicas = options.nproc if options.strategy == "ddp" else 1
    loaded = replicas if not trainer_for(spec.trains).reads_weights else options.nproc
    return loaded * sum(sizes.values()) + replicas * 3 * trained


def _trained(spec: RunSpec, base: Path, names: Iterable[str]) -> set[str]:
    """Return the tensors that are certainly trained; other trainers than these may leave out any."""
    is_known = spec.trains in ("all", "feed_forward") or spec.trains not in installed_plugins().offers(Trainer)
    if spec.kind != "expert" or not is_known:
        return set()
    return changeable_tensors(spec.trains, names, str(read_json(base / "config.json").get("model_type")))


def _uses_gpu(spec: RunSpec, gpus: Sequence[str]) -> bool:
    return bool(gpus) and spec.training.device != "cpu"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
