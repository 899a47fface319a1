"""Training process of one request: `python -m expertctl.experts.federation.owner.work STATE REQUEST`.

It outlives the process that started it and writes its progress into the run's folder. Killed at any point and started again, it
resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ....core.artefacts.files import exclusive, user_fixable_error, write_json, write_text
from ....core.artefacts.layout import CONFIG_FILE, Layout
from ....core.config.project import load_project
from ....core.config.settings import ExpertConfig, ProjectConfig, validate_settings
from ....core.errors import Interrupted, UserError
from ....core.manifests.run import RUN_FILE, read_run
from ....core.process.allocator import keep_freed_memory
from ....core.process.compute import available_cores
from ....core.process.environment import prepare_libraries
from ....core.reporting import SILENT, Reporter
from ...runs.branching import branch
from ...text.corpora import prepare_domain
from ...training.run_inputs import RunInputs
from ...training.starting_point import training_blocks
from ..protocol.requests import ExpertRequest, FailureCode, Progress
from .owner import PROCESS_FILE, PROGRESS_FILE, SPENT_FILE, Owner
from .policy import GIGABYTE, read_policy

PATIENCE_S = 60.0
"""Seconds for which training may go on after the hours of the policy, to end its step and to save its state."""


def main(arguments: list[str]) -> int:
    """Train the expert; return the exit status."""
    prepare_libraries()
    keep_freed_memory()
    owner = Owner(Path(arguments[0]))
    try:
        limit_memory(read_policy(owner.state).max_memory_gb)
        request = owner.request(arguments[1])
        (owner.run_folder(request) / PROCESS_FILE).write_text(str(os.getpid()))
        work(owner, request)
    except UserError as error:
        print(f"Error: {error}", flush=True)
        return error.exit_status
    return 0


def limit_memory(gigabytes: float | None) -> None:
    """Limit the memory that this process can allocate; more raises `MemoryError`."""
    if gigabytes is not None:
        import resource

        size = int(gigabytes * GIGABYTE)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def work(
    owner: Owner, request: ExpertRequest, reporter: Reporter = SILENT, stopped: Callable[[], bool] = lambda: False
) -> Path:
    """Train a request's expert in this process, unless it is finished, and return its folder.

    Raises `UserError` for errors that the owner can fix; only their code is reported to the coordinator.
    """
    folder, expert = owner.run_folder(request), owner.expert_folder(request)
    privacy = owner.privacy(request)
    limit = read_policy(owner.state).max_hours
    progress = _ProgressFile(folder, reporter, owner.seconds_spent(request), private=privacy is not None)

    def is_over_limit() -> bool:
        return limit is not None and progress.seconds_spent >= 3600 * limit

    with exclusive(folder / ".locks" / "work", f"request {request.id}"), _ended_after(limit, progress):
        if owner.is_trained(request):
            return expert
        if not owner.is_private_enough(request):
            owner.discard_training(request)
        try:
            progress.phase = "SEED"
            layout = _workspace(owner, request)
            progress.phase = "DATA"
            project = load_project(layout.config_file)
            prepare_domain(layout, request.owner, project.domains[request.owner], layout.seed)
            progress.phase = "TRAINING"
            _branch(layout, project, request, privacy)
            progress.phase = "DATA"
            training_blocks(RunInputs.of_folder(expert))  # raises for too little text
            progress.phase = "TRAINING"
            _train(expert, owner, request, progress, lambda: stopped() or is_over_limit())
        except Interrupted as error:
            if not is_over_limit():
                progress.fail(error)
                raise
            progress.phase = "POLICY"
            refused = UserError(
                f"training for the request has taken the {limit:g} hours that your policy allows; it is stopped"
            )
            progress.fail(refused)
            raise refused from None
        except Exception as error:
            progress.fail(error)
            raise
    return expert


@contextmanager
def _ended_after(hours: float | None, progress: _ProgressFile) -> Iterator[None]:
    """End this process if training goes on `PATIENCE_S` seconds after its limit: one step can be as long as a request wants."""
    if hours is None:
        yield
        return

    def end() -> None:
        progress.phase = "POLICY"
        progress.fail(UserError("over the limit"))
        os._exit(1)

    timer = threading.Timer(max(hours * 3600 - progress.seconds_spent, 0.0) + PATIENCE_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _workspace(owner: Owner, request: ExpertRequest) -> Layout:
    """Create the workspace of a request, with the owner's text as the only domain and the request's seed."""
    settings = owner.settings()
    root = owner.run_folder(request)
    if not owner.seeds.has(request):
        raise UserError(f"seed {request.seed[:12]} is missing; fetch it first")
    domain = {"path": str(settings.data), "text_field": settings.text_field, "licence": settings.licence}
    content = json.dumps({"domains": {request.owner: domain}}, indent=2)  # JSON is YAML
    write_text(root / CONFIG_FILE, content)
    seed = root / "seed"
    if not seed.exists():
        seed.symlink_to(owner.seeds.folder(request).resolve(), target_is_directory=True)
    if request.recipe.round is not None and not (root / "corpora").exists():
        corpora = owner.shared_folder(request) / "corpora"
        corpora.mkdir(parents=True, exist_ok=True, mode=0o700)
        (root / "corpora").symlink_to(corpora.resolve(), target_is_directory=True)
    return Layout(root)


def _branch(layout: Layout, project: ProjectConfig, request: ExpertRequest, privacy: Mapping[str, Any] | None) -> None:
    if (layout.experts / request.owner / RUN_FILE).is_file():
        return
    recipe = request.recipe
    settings = {
        "domain": request.owner,
        "trains": recipe.trains,
        "options": dict(recipe.options),
        "training": dict(recipe.training),
        "owner": request.owner,
        **({"dp": dict(privacy)} if privacy is not None else {}),
    }
    branch(layout, project, request.owner, validate_settings(ExpertConfig, settings, "the request's recipe"))


def _train(
    folder: Path, owner: Owner, request: ExpertRequest, progress: _ProgressFile, stopped: Callable[[], bool]
) -> None:
    import torch

    from ...training.run import train_run
    from .inner_training import train_round

    torch.set_num_threads(min(read_run(folder).training.threads, available_cores()))
    if request.recipe.round is None:
        train_run(folder, progress, stopped)
    else:
        train_round(folder, request.recipe.round, owner.shared_folder(request) / "state", progress, stopped)
    last = progress.last
    progress.write(Progress("ready", last.steps, last.steps, last.loss, 0.0))


class _ProgressFile(Reporter):
    """Writes the progress of a training run to a file and passes it on; without the loss if the run is `private`."""

    def __init__(self, folder: Path, reporter: Reporter, spent_before: float, *, private: bool) -> None:
        self._folder, self._reporter, self._private = folder, reporter, private
        self._spent_before, self._began = spent_before, time.monotonic()
        self.phase: FailureCode = "TRAINING"
        """Code of a failure in the current phase."""
        self._start: tuple[float, int] | None = None
        """(time, step) at which training started or resumed."""
        self.last = Progress("training")

    @property
    def seconds_spent(self) -> float:
        """How long training has taken, in this process and in those before it."""
        return self._spent_before + time.monotonic() - self._began

    def run_progressed(self, run: Path, record: Mapping[str, Any]) -> None:
        step, now = int(record.get("step", self.last.step)), time.monotonic()
        steps = int(record.get("total_steps", self.last.steps))
        if record.get("event") == "started" or self._start is None:
            self._start = (now, step)
        start, first_step = self._start
        left = round((now - start) / (step - first_step) * (steps - step), 1) if step > first_step else None
        loss = None if self._private else record.get("loss")  # the loss depends on the text and has no noise
        loss = round(float(loss), 2) if loss is not None else self.last.loss
        self.write(Progress("training", step, steps, loss, left))

    def fail(self, error: Exception) -> None:
        """Write the code of a failure, never its message, which may hold paths or text."""
        code: FailureCode = self.phase
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if isinstance(error, Interrupted):
            code = "STOPPED"
        elif isinstance(cause, OSError) and user_fixable_error(cause) is not None:
            code = "DISK"
        elif isinstance(error, MemoryError) or "allocate memory" in str(error):
            code = "MEMORY"
        self.write(Progress("failed", self.last.step, self.last.steps, self.last.loss, None, code))

    def write(self, progress: Progress) -> None:
        self.last = progress
        write_json(self._folder / PROGRESS_FILE, progress.as_json())
        write_json(self._folder / SPENT_FILE, {"seconds": round(self.seconds_spent, 1)})
        self._reporter.progress("training", progress.step, progress.steps or None, "steps")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
