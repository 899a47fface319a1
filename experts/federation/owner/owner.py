"""An owner's side of a federation: requests are remembered, seeds kept, experts trained in a process of their own.

Everything is in the owner's state folder, which nobody else can read:

    owner.key owner.pub   settings.json (where the text is)   requests/ID.json   seeds/DIGEST/
    runs/ID/ (a workspace)   deliveries/ID/   outcomes/ID.json   shared/ROUNDS/ (kept from round to round)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ....core.artefacts.files import is_alive, read_json, readable_os_errors, remove_tree, write_json
from ....core.artefacts.safetensors_io import SINGLE_FILE, Checkpoint
from ....core.errors import UserError
from ..protocol.delivery import Signed, make_delivery
from ..protocol.keys import OwnerKey, read_key
from ..protocol.progress import Progress
from ..protocol.requests import ExpertRequest, is_identifier, without_superseded
from .kept_seeds import KeptSeeds
from .owner_privacy import checked_privacy, is_private_enough, privacy_of

SETTINGS_FILE = "settings.json"
LOG_FILE = "work.log"
PROGRESS_FILE = "progress.json"
PROCESS_FILE = "process.txt"
STOP_S = 10.0
"""How long a training may take to end before it is killed."""


@dataclass(frozen=True)
class OwnerSettings:
    """Where the owner's text is; never leaves."""

    data: Path
    text_field: str = "text"
    licence: str | None = None
    privacy: Mapping[str, Any] | None = None
    """Differential privacy that the owner insists on, whatever is asked for."""


@dataclass(frozen=True)
class Review:
    """What would leave, for the owner to look at."""

    request: ExpertRequest
    files: Mapping[str, int]
    """Bytes."""
    tensors: tuple[tuple[str, str, tuple[int, ...], int, str], ...]
    """(name, dtype, shape, bytes, digest)."""
    data: Mapping[str, Any]
    privacy: Mapping[str, Any] | None


class Owner:
    """What one data owner has: a key, text, requests, and the experts trained for them."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.seeds = KeptSeeds(state / "seeds")

    # --- who and where ---

    def configure(self, settings: OwnerSettings) -> None:
        """Remember where the text is, and how private training has to be; raises `UserError` where there is no text."""
        data = settings.data.expanduser().resolve()
        if not data.exists():
            raise UserError(f"{data} does not exist; name the folder or file with your text")
        with readable_os_errors(self.state):
            self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.state.chmod(0o700)
        privacy = checked_privacy(settings.privacy) if settings.privacy is not None else None
        write_json(self.state / SETTINGS_FILE, {**asdict(settings), "data": str(data), "privacy": privacy})

    def settings(self) -> OwnerSettings:
        """Return where the text is; raises `UserError` before it was told."""
        if not self.is_configured:
            raise UserError(f"{self.state} does not know where your text is; name it with --data")
        content = read_json(self.state / SETTINGS_FILE)
        return OwnerSettings(**{**content, "data": Path(content["data"])})

    @property
    def is_configured(self) -> bool:
        """Tell whether it is known where the text is."""
        return (self.state / SETTINGS_FILE).is_file()

    def privacy(self, request: ExpertRequest) -> dict[str, Any] | None:
        """Return how private the training for a request has to be; raises `UserError` where it cannot be as the owner insists."""
        return privacy_of(request, self.settings().privacy if self.is_configured else None)

    def why_not(self, request: ExpertRequest) -> str | None:
        """Return why a request that was taken once is not carried out any more, or None."""
        try:
            self.privacy(request)
        except UserError as error:
            return str(error)
        return None

    def key(self) -> OwnerKey:
        return read_key(self.state)

    # --- requests ---

    def take(self, request: ExpertRequest) -> None:
        """Remember a request; raises `UserError` for one that is not for this owner's key, or asks what is not done."""
        if request.key != self.key().public.fingerprint:
            raise UserError("the request is for another key than the one here")
        check_recipe(request)
        self.privacy(request)
        (self.state / "requests").mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(self.state / "requests" / f"{request.id}.json", request.as_json())

    def requests(self) -> list[ExpertRequest]:
        """Return what was asked so far."""
        return without_superseded(self._all_requests())

    def _all_requests(self) -> list[ExpertRequest]:
        paths = sorted((self.state / "requests").glob("*.json"))
        return [ExpertRequest.of_json(read_json(path)) for path in paths]

    def drop_superseded(self) -> None:
        """Let go of rounds of a shared model that a later one has taken the place of: their training, weights and seeds."""
        everything, current = self._all_requests(), self.requests()
        needed = {request.seed for request in current}
        for request in everything:
            if request in current:
                continue
            self.stop(request.id)
            for folder in (self.run_folder(request.id), self.delivery_folder(request.id)):
                remove_tree(folder)
            if request.seed not in needed:
                self.seeds.drop(request)
            for name in ("outcomes", "requests"):
                (self.state / name / f"{request.id}.json").unlink(missing_ok=True)

    def shared_folder(self, request: ExpertRequest) -> Path:
        """Return what is kept from one round of a shared model to the next: the text's tokens, and the optimiser's state."""
        part = request.recipe.round
        assert part is not None
        return self.state / "shared" / _safe(part.rounds)

    def request(self, identifier: str) -> ExpertRequest:
        path = self.state / "requests" / f"{identifier}.json"
        if not is_identifier(identifier) or not path.is_file():
            raise UserError(f"nothing was asked under '{identifier:.40}'")
        return ExpertRequest.of_json(read_json(path))

    # --- training ---

    def run_folder(self, identifier: str) -> Path:
        """Return the workspace in which a request is worked on."""
        return self.state / "runs" / _safe(identifier)

    def expert_folder(self, request: ExpertRequest) -> Path:
        return self.run_folder(request.id) / "experts" / request.owner

    def is_trained(self, request: ExpertRequest) -> bool:
        finished = (self.expert_folder(request) / "expert.json").is_file()
        return finished and self.is_private_enough(request)

    def is_private_enough(self, request: ExpertRequest) -> bool:
        """Tell whether what was begun for a request is as private as it has to be now."""
        return is_private_enough(self.expert_folder(request), self.privacy(request))

    def begin_anew(self, request: ExpertRequest) -> None:
        """Let go of what was trained for a request, and of what was made ready to leave; nobody may be working on it."""
        remove_tree(self.delivery_folder(request.id))
        remove_tree(self.expert_folder(request))

    def start(self, identifier: str) -> None:
        """Train in a process of its own, which outlives this one and goes on where an earlier one stopped.

        Does nothing while one is running, and after the expert is finished.
        """
        request = self.request(identifier)
        if not self.is_private_enough(request):
            self.stop(identifier)
            self.begin_anew(request)
        if self.is_trained(request) or self.is_working(identifier):
            return
        folder = self.run_folder(identifier)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = [
            sys.executable,
            "-P",
            "-m",
            "expertctl.experts.federation.owner.work",
            str(self.state.resolve()),
            identifier,
        ]
        with (folder / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=folder
            )
        (folder / PROCESS_FILE).write_text(str(process.pid))

    def stop(self, identifier: str) -> None:
        """End the process that trains for a request, if there is one; what it has not saved is lost."""
        path = self.run_folder(identifier) / PROCESS_FILE
        end = time.monotonic() + STOP_S
        while self.is_working(identifier):
            os.kill(int(path.read_text()), signal.SIGTERM if time.monotonic() < end else signal.SIGKILL)
            time.sleep(0.1)

    def is_working(self, identifier: str) -> bool:
        """Tell whether a process is training for a request."""
        path = self.run_folder(identifier) / PROCESS_FILE
        if not path.is_file():
            return False
        pid = path.read_text().strip()
        reap(pid)
        return is_alive(pid)

    def progress(self, identifier: str) -> Progress:
        """Return how far a request has come."""
        request = self.request(identifier)
        path = self.run_folder(identifier) / PROGRESS_FILE
        last = Progress.of_json(read_json(path)) if path.is_file() else Progress("waiting")
        if self.is_trained(request):
            return replace(last, state="ready", seconds_left=0.0, code="")
        if last.state == "training" and not self.is_working(identifier):
            return replace(last, state="failed", code="STOPPED", seconds_left=None)
        return last

    # --- what leaves ---

    def review(self, identifier: str) -> Review:
        """Make what would leave, and return what it is; nothing leaves by this."""
        request = self.request(identifier)
        signed = self.delivery(identifier)
        folder = self.delivery_folder(identifier)
        tensors = []
        for file in sorted(folder.glob("*.safetensors")):
            stored = Checkpoint([file])
            prefix = "" if file.name == SINGLE_FILE else f"{file.stem}/"
            for name, digest in stored.digests().items():
                entry = stored.entry(name)
                tensors.append((prefix + name, entry.dtype, entry.shape, entry.num_bytes, digest))
        return Review(
            request,
            {file.name: file.size for file in signed.statement.files},
            tuple(tensors),
            signed.statement.data,
            signed.statement.privacy,
        )

    def delivery_folder(self, identifier: str) -> Path:
        return self.state / "deliveries" / _safe(identifier)

    def delivery(self, identifier: str) -> Signed:
        """Return the signed statement of what leaves, making it first where it was not made; raises before training ends."""
        request = self.request(identifier)
        folder = self.delivery_folder(identifier)
        if not self.is_private_enough(request):
            raise UserError(
                f"the expert of request {identifier} has less privacy than was asked for, or than you insist on; train it again"
            )
        if (folder / "delivery.json").is_file():
            return Signed.read(folder)
        if not self.is_trained(request):
            raise UserError(f"the expert of request {identifier} is not trained yet")
        return make_delivery(self.expert_folder(request), request, self.key(), folder)

    def note_outcome(self, identifier: str, refusal: str | None) -> None:
        """Remember what became of a delivery: None for an accepted one, else the code of the refusal."""
        (self.state / "outcomes").mkdir(exist_ok=True, mode=0o700)
        write_json(self.state / "outcomes" / f"{_safe(identifier)}.json", {"refusal": refusal})
        request = self.request(identifier)
        if refusal is None and request.recipe.round is not None and request.recipe.round.is_last:
            remove_tree(self.shared_folder(request))

    def outcome(self, identifier: str) -> str | None:
        """Return `accepted`, the code of a refusal, or None where nothing was delivered."""
        path = self.state / "outcomes" / f"{_safe(identifier)}.json"
        return (read_json(path)["refusal"] or "accepted") if path.is_file() else None


def check_recipe(request: ExpertRequest) -> None:
    """Refuse what a coordinator has no business to ask for: paths of this machine, noise that can be subtracted."""
    recipe = request.recipe
    if recipe.privacy is not None and recipe.privacy.get("noise", "secret") != "secret":
        raise UserError(
            "the request asks for noise that can be made again, which protects nobody; it is not carried out"
        )
    for name, value in {**recipe.options, **recipe.training}.items():
        if isinstance(value, str) and any(mark in value for mark in "/\\~"):
            raise UserError(
                f"the request sets '{name:.40}' to a path, which is not the coordinator's to choose; it is not carried out"
            )
        if not isinstance(value, str | int | float | bool | list | None):
            raise UserError(f"the request sets '{name:.40}' to something that no option takes")


def reap(pid: str) -> None:
    """Let a child that has ended go, so that its number does not seem alive."""
    try:
        os.waitpid(int(pid), os.WNOHANG)
    except (ChildProcessError, ValueError):
        return


def _safe(identifier: str) -> str:
    if not identifier or not all(letter in "0123456789abcdef" for letter in identifier):
        raise UserError(f"'{identifier:.40}' is no identifier")
    return identifier
