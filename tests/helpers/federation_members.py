"""Test helpers for owners and a coordinator in one process: text, clocks and deliveries."""

from __future__ import annotations

import inspect
import json
import statistics
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

from expertctl.experts.federation.coordinator.coordinator import Coordinator
from expertctl.experts.federation.judging.refusal import Refusal
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.owner.work import work
from expertctl.experts.federation.protocol.delivery import SignedStatement
from expertctl.experts.federation.protocol.parts import read_part
from expertctl.experts.federation.protocol.requests import ExpertRequest, Recipe

TRAINING = {"tokens": 320, "sequence_length": 16, "batch_size": 2, "learning_rate": 0.003}
BTM = Recipe("all", {}, TRAINING)
FLEXOLMO = Recipe("flexolmo", {"embedding": "none"}, TRAINING)
LORA = Recipe("lora", {"rank": 2, "targets": "q_proj,up_proj"}, TRAINING)
PROMPT = Recipe("prompt", {"tokens": 3}, TRAINING)
MODULES: dict[str, ModuleType] = {"site-a": textwrap, "site-b": statistics}


def private_text(path: Path, module: ModuleType) -> Path:
    lines = inspect.getsource(module).splitlines()
    texts = ["\n".join(lines[begin : begin + 8]) for begin in range(0, min(len(lines), 400), 8)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.time = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def pass_hours(self, hours: float) -> None:
        self.time += timedelta(hours=hours)


def fetch_seed(coordinator: Coordinator, owner: Owner, request: ExpertRequest) -> None:
    for writer in owner.seeds.writers(request):
        for index in writer.missing():
            path, *_ = coordinator.seed_span(request, writer.file.name, index)
            writer.put(index, read_part(path, writer.file, index))
    owner.seeds.complete(request)


def trained(coordinator: Coordinator, owner: Owner, request: ExpertRequest) -> Path:
    """Train a request's expert at an owner; return its folder."""
    owner.take(request)
    fetch_seed(coordinator, owner, request)
    return work(owner, request)


def hand_in(coordinator: Coordinator, folder: Path, request: ExpertRequest, signed: SignedStatement) -> Refusal | None:
    """Deliver a folder with a signed statement; return the refusal or None."""
    wanted = coordinator.begin(request, signed)
    if not isinstance(wanted, dict):
        return wanted
    for file in signed.statement.files:
        for index in wanted[file.name]:
            coordinator.files.put(request.id, file.name, index, read_part(folder / file.name, file, index))
    return coordinator.finish(request)
