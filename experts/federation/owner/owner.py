"""An owner's side of a federation: stores requests and seeds, and trains experts in separate processes.

All files are in the owner's state folder, which other users cannot read:

    owner.key owner.pub   name.json   settings.json (where the text is)   requests/ID.json   seeds/DIGEST/
    runs/ID/ (a workspace)   deliveries/ID/   outcomes/ID.json   shared/ROUNDS/ (state between rounds)
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from ....core.artefacts.files import (
    inside,
    is_alive,
    link_or_copy,
    os_errors_as_user_errors,
    read_json,
    remove_tree,
    write_json,
)
from ....core.artefacts.safetensors_io import SINGLE_FILE, Checkpoint
from ....core.config.settings import DpConfig, validate_settings
from ....core.errors import UserError
from ....core.manifests.run import RUN_FILE, read_run
from ....core.manifests.statements import DataStatement, PrivacyStatement
from ..protocol.delivery import DELIVERY_FILE, MAX_TEXT, SignedStatement, make_delivery
from ..protocol.keys import KEY_FILE, PUBLIC_FILE, OwnerKey, make_key, read_key
from ..protocol.parts import PART_BYTES
from ..protocol.requests import ExpertRequest, Progress, is_identifier, without_superseded
from ..protocol.rotation import KeyRotation
from .kept_seeds import KeptSeeds
from .policy import describe, read_policy

SETTINGS_FILE = "settings.json"
NAME_FILE = "name.json"
LOG_FILE = "work.log"
PROGRESS_FILE = "progress.json"
SPENT_FILE = "spent.json"
PROCESS_FILE = "process.txt"
Record = TypeVar("Record")
LARGEST_SETTINGS = {"threads": 256, "batch_size": 1 << 16, "accumulation": 1 << 20, "sequence_length": 1 << 20}
"""Largest training settings that a request can have: larger ones could only exhaust the machine."""
STOP_S = 10.0
"""Seconds that a training process gets to end before it is killed."""


@dataclass(frozen=True)
class OwnerSettings:
    """Location of the owner's text, its licence and the owner's privacy demand; stays with the owner."""

    data: Path
    """Folder or file with the text."""
    text_field: str = "text"
    licence: str | None = None
    privacy: Mapping[str, Any] | None = None
    """Differential privacy that the owner demands for every request; None for none."""


@dataclass(frozen=True)
class Review:
    """Content of a delivery, for the owner to review before it leaves."""

    request: ExpertRequest
    files: Mapping[str, int]
    """File sizes in bytes, by name."""
    tensors: Mapping[str, Mapping[str, Any]]
    """`dtype`, `shape`, `bytes` and `digest` of each tensor, by name."""
    data: DataStatement
    privacy: PrivacyStatement | None


class Owner:
    """State of one data owner: key, text, requests and the experts trained for them."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.seeds = KeptSeeds(state / "seeds")

    # --- settings ---

    def configure(self, settings: OwnerSettings) -> None:
        """Store the settings; raises `UserError` if the text does not exist or the privacy settings are invalid."""
        data = settings.data.expanduser().resolve()
        if not data.exists():
            raise UserError(f"{data} does not exist; name the folder or file with your text")
        with os_errors_as_user_errors(self.state):
            self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.state.chmod(0o700)
        if settings.privacy is not None:
            check_privacy(settings.privacy)
        if settings.licence is not None and (len(settings.licence) > MAX_TEXT or not settings.licence.isprintable()):
            raise UserError(
                f"the licence has to be one printable line of at most {MAX_TEXT} letters, or delivery would be refused"
            )
        write_json(self.state / SETTINGS_FILE, {**asdict(settings), "data": str(data)})

    def settings(self) -> OwnerSettings:
        """Return the stored settings; raises `UserError` if there are none."""
        if not self.is_configured:
            raise UserError(f"{self.state} has no location of your text; set it with --data")
        content = read_json(self.state / SETTINGS_FILE)
        return OwnerSettings(**{**content, "data": Path(content["data"])})

    @property
    def is_configured(self) -> bool:
        """Return whether settings are stored."""
        return (self.state / SETTINGS_FILE).is_file()

    def privacy(self, request: ExpertRequest) -> dict[str, Any] | None:
        """Return the privacy settings for a request: the coordinator's, the owner's, or the smaller budget of both.

        None means without differential privacy. Raises `UserError` if the owner demands noise for a round of a shared model.
        """
        requested, demanded = request.recipe.privacy, self.settings().privacy if self.is_configured else None
        if demanded is None:
            return dict(requested) if requested is not None else None
        if request.recipe.round is not None:
            raise UserError(
                f"your settings demand differential privacy, and {request.recipe.round} is trained without; it is refused"
            )
        if requested is None:
            return dict(demanded)
        budget = {name: min(requested[name], demanded[name]) for name in ("epsilon", "delta")}
        return {**requested, **demanded, **budget}

    def objection(self, request: ExpertRequest) -> str | None:
        """Return why a request conflicts with the owner's current settings and policy, or None."""
        try:
            policy = read_policy(self.state)
            objection = policy.objection(request, self.noise(request))
        except UserError as error:
            return str(error)
        hours = self.seconds_spent(request) / 3600
        if objection is None and hours >= (policy.max_hours or math.inf) and not self.is_trained(request):
            return f"training for the request has taken {hours:.1f} hours; your policy allows {policy.max_hours:g}"
        return objection

    def max_parallel(self) -> int:
        """Return how many requests may be trained at a time; 0 while the policy is invalid, which `objection` explains."""
        try:
            return read_policy(self.state).max_parallel
        except UserError:
            return 0

    def noise(self, request: ExpertRequest) -> DpConfig | None:
        """Return the differential privacy that a request is trained with; see `privacy`."""
        privacy = self.privacy(request)
        return validate_settings(DpConfig, privacy, "the differential privacy") if privacy is not None else None

    def describe(self, request: ExpertRequest) -> str:
        """Return a line with what a request asks for."""
        return describe(request, self.noise(request))

    def key(self) -> OwnerKey:
        return read_key(self.state)

    def rotate_key(self, send: Callable[[KeyRotation, OwnerKey], None]) -> OwnerKey:
        """Make another key pair, `send` the rotation and the new key to the coordinator, and use it if that succeeds.

        The old pair is kept beside it, with the ending `.old`. Statements of deliveries are signed again when they are sent.
        """
        old, folder = self.key(), self.state / "next-key"
        new = (
            read_key(folder) if (folder / KEY_FILE).is_file() else make_key(folder)
        )  # an earlier try may have been sent
        send(KeyRotation.of(old, new), new)
        for name in (PUBLIC_FILE, KEY_FILE):  # the private key last: until then, the same command goes on
            if (folder / name).is_file():
                remove_tree(self.state / f"{name}.old")
                link_or_copy(self.state / name, self.state / f"{name}.old")
                (folder / name).replace(self.state / name)
        remove_tree(folder)
        remove_tree(self.state / "deliveries")
        return self.key()

    # --- requests ---

    def take(self, request: ExpertRequest) -> None:
        """Store a request; raises `UserError` if it is for another key or name, is late, or exceeds settings or policy."""
        if request.key != self.key().public.fingerprint:
            raise UserError(
                "the request is for another key; ask the coordinator for a request for the key in this state folder"
            )
        if (name := self.own_name()) is not None and request.owner != name:
            raise UserError(
                f"the request is for '{request.owner}', and this state folder is that of '{name}'; it is refused (if the "
                f"coordinator renamed you, delete {self.state / NAME_FILE})"
            )
        check_recipe(request)
        known = self._file("requests", request.id)
        if known.is_file() and ExpertRequest.of_json(read_json(known)).recipe != request.recipe:
            raise UserError(
                "the request has the identifier of another one that asked for something else; it is refused"
            )
        if request.deadline < datetime.now(UTC):
            raise UserError(
                f"the deadline of the request has passed ({request.deadline:%Y-%m-%d %H:%M} UTC); ask for a new one"
            )
        if (objection := self.objection(request)) is not None:
            raise UserError(f"{objection}; the request is refused")
        check_sizes(request)
        write_json(self.state / NAME_FILE, {"name": request.owner})
        (self.state / "requests").mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(self._file("requests", request.id), request.as_json())

    def own_name(self) -> str | None:
        """Return the name under which the coordinator asked before; None before the first request."""
        path = self.state / NAME_FILE
        return str(read_json(path).get("name")) if path.is_file() else None

    def requests(self) -> list[ExpertRequest]:
        """Return the stored requests, without superseded rounds."""
        return without_superseded(self._all_requests())

    def _all_requests(self) -> list[ExpertRequest]:
        paths = sorted((self.state / "requests").glob("*.json"))
        requests = [_read_or_set_aside(path, ExpertRequest.of_json) for path in paths if is_identifier(path.stem)]
        return [request for request in requests if request is not None]

    def drop_superseded(self) -> None:
        """Delete the requests, runs, deliveries and unused seeds of rounds that a later round replaces."""
        requests, current = self._all_requests(), self.requests()
        needed = {request.seed for request in current}
        for request in requests:
            if request in current:
                continue
            self.stop(request)
            if request.seed not in needed:
                self.seeds.drop(request)
            remove_tree(self.run_folder(request))
            remove_tree(self.delivery_folder(request))
            for folder in ("outcomes", "requests"):
                remove_tree(self._file(folder, request.id))

    def stored_at(self, request: ExpertRequest) -> float:
        """Return when a request was stored, in seconds since the epoch."""
        return self._file("requests", request.id).stat().st_mtime

    def close(self, request: ExpertRequest, code: str) -> None:
        """Stop working on a request: `DECLINED` by the owner, or `WITHDRAWN` by the coordinator."""
        self.note_outcome(request, code)
        self.stop(request)

    def shared_folder(self, request: ExpertRequest) -> Path:
        """Return the folder with the state between rounds of a shared model: tokenised text and optimiser state."""
        round_ = request.recipe.round
        assert round_ is not None
        return inside(self.state, "shared", round_.rounds)

    def request(self, identifier: str) -> ExpertRequest:
        """Return a stored request by its identifier; raises `UserError` if there is none."""
        path = self._file("requests", identifier)
        if not is_identifier(identifier) or not path.is_file():
            raise UserError(f"there is no request '{identifier:.40}' in {self.state}")
        return ExpertRequest.of_json(read_json(path))

    def _file(self, folder: str, identifier: str) -> Path:
        return inside(self.state, folder, f"{identifier}.json")

    # --- training ---

    def run_folder(self, request: ExpertRequest) -> Path:
        """Return the workspace in which a request's expert is trained."""
        return inside(self.state, "runs", request.id)

    def expert_folder(self, request: ExpertRequest) -> Path:
        return inside(self.run_folder(request), "experts", request.owner)

    def is_trained(self, request: ExpertRequest) -> bool:
        finished = (self.expert_folder(request) / "expert.json").is_file()
        return finished and self.is_private_enough(request)

    def is_private_enough(self, request: ExpertRequest) -> bool:
        """Return whether a request's run keeps to the current privacy settings; true if there is no run."""
        privacy, folder = self.privacy(request), self.expert_folder(request)
        if privacy is None or not (folder / RUN_FILE).is_file():
            return True
        dp = read_run(folder).dp
        if dp is None or dp.noise != "secret":
            return False
        return bool(dp.epsilon <= privacy["epsilon"] and dp.delta <= privacy["delta"])

    def discard_training(self, request: ExpertRequest) -> None:
        """Delete a request's run and delivery; its training process must have ended."""
        remove_tree(self.delivery_folder(request))
        remove_tree(self.expert_folder(request))

    def start(self, request: ExpertRequest) -> None:
        """Start a training process that outlives this one and resumes from the last checkpoint.

        Does nothing while a process is training and after the expert is finished.
        """
        if not self.is_private_enough(request):
            self.stop(request)
            self.discard_training(request)
        if self.is_trained(request) or self.is_working(request):
            return
        folder = self.run_folder(request)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        module = "expertctl.experts.federation.owner.work"
        command = [sys.executable, "-P", "-m", module, str(self.state.resolve()), request.id]
        with (folder / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=folder
            )
        (folder / PROCESS_FILE).write_text(str(process.pid))

    def seconds_spent(self, request: ExpertRequest) -> float:
        """Return how long training for a request has taken."""
        path = self.run_folder(request) / SPENT_FILE
        content = _read_or_set_aside(path, dict[str, Any]) if path.is_file() else None
        return float((content or {}).get("seconds", 0.0))

    def stop(self, request: ExpertRequest) -> None:
        """Stop a request's training process, if there is one; steps since its last checkpoint are lost."""
        path = self.run_folder(request) / PROCESS_FILE
        kill_at = time.monotonic() + STOP_S
        while self.is_working(request):
            os.kill(int(path.read_text()), signal.SIGTERM if time.monotonic() < kill_at else signal.SIGKILL)
            time.sleep(0.1)

    def is_working(self, request: ExpertRequest) -> bool:
        """Return whether a process is training a request's expert."""
        path = self.run_folder(request) / PROCESS_FILE
        if not path.is_file():
            return False
        pid = path.read_text().strip()
        with suppress(ChildProcessError, ValueError):
            os.waitpid(int(pid), os.WNOHANG)  # a child counts as alive until its exit status is collected
        if not is_alive(pid):
            return False
        try:  # the system may have given the number to another process since
            command = Path(f"/proc/{int(pid)}/cmdline").read_bytes()
            return not command or request.id.encode() in command  # it has none for a moment while it starts
        except (OSError, ValueError):
            return not Path("/proc").is_dir()

    def progress(self, request: ExpertRequest) -> Progress:
        """Return the progress of a request's training run."""
        path = self.run_folder(request) / PROGRESS_FILE
        last = (_read_or_set_aside(path, Progress.of_json) if path.is_file() else None) or Progress("waiting")
        if self.is_trained(request):
            return replace(last, state="ready", seconds_left=0.0, code="")
        if last.state == "training" and not self.is_working(request):
            return replace(last, state="failed", code="STOPPED", seconds_left=None)
        return last

    # --- deliveries ---

    def review(self, request: ExpertRequest) -> Review:
        """Prepare a delivery and return its content for review; sends nothing."""
        statement = self.delivery(request).statement
        tensors = {}
        for file in sorted(self.delivery_folder(request).glob("*.safetensors")):
            stored = Checkpoint([file])
            prefix = "" if file.name == SINGLE_FILE else f"{file.stem}/"
            for name, digest in stored.digests().items():
                entry = stored.entry(name)
                info = {"dtype": entry.dtype, "shape": entry.shape, "bytes": entry.num_bytes, "digest": digest}
                tensors[prefix + name] = info
        files = {file.name: file.size for file in statement.files}
        return Review(request, files, tensors, statement.data, statement.privacy)

    def delivery_folder(self, request: ExpertRequest) -> Path:
        return inside(self.state, "deliveries", request.id)

    def delivery(self, request: ExpertRequest, *, part_size: int = PART_BYTES) -> SignedStatement:
        """Return the signed statement of a delivery, preparing it in parts of `part_size` bytes if needed.

        Raises `UserError` before training ends and for a run with too little privacy.
        """
        folder = self.delivery_folder(request)
        if not self.is_private_enough(request):
            raise UserError(
                f"the expert of request {request.id} was trained with less privacy than the request or your settings demand; "
                "train it again"
            )
        if (folder / DELIVERY_FILE).is_file():
            return SignedStatement.read(folder)
        if not self.is_trained(request):
            raise UserError(f"the expert of request {request.id} is not trained yet")
        return make_delivery(self.expert_folder(request), request, self.key(), folder, part_size=part_size)

    def note_outcome(self, request: ExpertRequest, refusal: str | None) -> None:
        """Store the outcome of a delivery: None if accepted, else the refusal's code."""
        (self.state / "outcomes").mkdir(exist_ok=True, mode=0o700)
        write_json(self._file("outcomes", request.id), {"refusal": refusal})
        if refusal is None and request.recipe.round is not None and request.recipe.round.is_last:
            remove_tree(self.shared_folder(request))

    def forget_outcome(self, request: ExpertRequest) -> None:
        """Delete the outcome of a delivery, so that it is sent again."""
        self._file("outcomes", request.id).unlink()

    def outcome(self, request: ExpertRequest) -> str | None:
        """Return `accepted`, the code of a refusal, or None before a delivery."""
        path = self._file("outcomes", request.id)
        content = _read_or_set_aside(path, dict[str, Any]) if path.is_file() else None
        return (content.get("refusal") or "accepted") if content is not None else None


def _read_or_set_aside(path: Path, parse: Callable[[Any], Record]) -> Record | None:
    """Return a JSON file of the state, or None for one that a crash has damaged, which is renamed.

    The coordinator sends requests again, and accepts a delivery twice.
    """
    try:
        return parse(read_json(path))
    except UserError:
        path.rename(path.with_name(f"{path.name}.damaged"))
        return None


def check_recipe(request: ExpertRequest) -> None:
    """Raise `UserError` for settings a coordinator must not choose: local paths, and noise from a known random seed."""
    recipe = request.recipe
    if recipe.privacy is not None and recipe.privacy.get("noise", "secret") != "secret":
        raise UserError("the request asks for seeded noise, which can be subtracted and protects nobody; it is refused")
    for name, value in {**recipe.options, **recipe.training}.items():
        if isinstance(value, str) and any(mark in value for mark in "/\\~"):
            raise UserError(f"the request sets '{name:.40}' to a path, which only the owner may choose; it is refused")
        if not isinstance(value, str | int | float | bool | list | None):
            raise UserError(f"the request sets '{name:.40}' to a value of an unsupported type; it is refused")


def check_sizes(request: ExpertRequest) -> None:
    """Raise `UserError` for training settings that could only exhaust the machine."""
    for name, most in LARGEST_SETTINGS.items():
        value = request.recipe.training.get(name, 1)
        if isinstance(value, int | float) and value > most:
            raise UserError(f"the request sets '{name}' to {value:g}, and {most:,} is the most here; it is refused")


def check_privacy(privacy: Mapping[str, Any]) -> None:
    """Raise `UserError` for invalid privacy settings."""
    validate_settings(DpConfig, dict(privacy), "the differential privacy (--dp)")
