"""What an owner's process does with each request: fetch the seed, train, show, deliver. Every step goes on where it was cut."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from ....core.errors import UserError
from ....experts.federation.owner.owner import Owner, Review
from ....experts.federation.protocol.delivery import Signed, make_delivery
from ....experts.federation.protocol.keys import PUBLIC_FILE
from ....experts.federation.protocol.parts import PART_BYTES, FileParts, read_part
from ....experts.federation.protocol.progress import Progress
from ....experts.federation.protocol.requests import ExpertRequest
from .coordinator_client import CoordinatorClient, Declined, Unreachable

TELL_S = 5.0
"""Between two messages about one training."""
RETRY_S = (2.0, 5.0, 10.0, 30.0, 60.0)
TRIES = 3
"""Times that a training may fail before `join --once` gives up on it."""
JUDGED_S = 2.0
PARTS_OF_A_DELIVERY = 64
SMALLEST_PART = 1 << 20

Agree = Callable[[Review], bool]
"""Asks the owner whether this may leave."""


class OwnerWork:
    """The requests of one owner. `step()` does what can be done now, and `pulse` is called in between."""

    def __init__(
        self,
        owner: Owner,
        client: CoordinatorClient,
        agree: Agree,
        tell: Callable[[str], None],
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        self._owner, self._client, self._agree, self._tell, self._pulse = owner, client, agree, tell, pulse
        self._later: dict[str, float] = {}
        self._tries: dict[str, int] = {}
        self._starts: dict[str, int] = {}
        self._told: dict[str, tuple[float, Progress]] = {}
        self._said: dict[str, str] = {}

    def step(self) -> None:
        """Take every request one step further."""
        self._owner.drop_superseded()
        for request in self._owner.requests():
            if (why := self._owner.why_not(request)) is not None:
                self._say(request, why)
            if time.monotonic() < self._later.get(request.id, 0.0) or self.is_over(request):
                continue
            try:
                self._advance(request)
                self._tries.pop(request.id, None)
            except Unreachable as error:
                self._wait(request, f"the coordinator cannot be reached ({error}); trying again")
            except Declined as error:
                if error.code == "UNKNOWN_KEY":
                    raise UserError(error.sentence(self._owner.state / PUBLIC_FILE)) from None
                self._wait(request, f"{error.sentence(self._owner.state / PUBLIC_FILE)}; trying again")

    def is_over(self, request: ExpertRequest) -> bool:
        """Tell whether nothing is to be done for a request: delivered, refused, too late, or not what the owner agrees to."""
        return (
            self._owner.outcome(request.id) is not None
            or request.deadline < datetime.now(UTC)
            or self._owner.why_not(request) is not None
        )

    def gave_up(self, request: ExpertRequest) -> str | None:
        """Return why a training that failed time after time is not worth waiting for, or None."""
        progress = self._owner.progress(request.id)
        failed = progress.state == "failed" and progress.code != "STOPPED"
        if not failed or self._starts.get(request.id, 0) < TRIES or self._owner.is_working(request.id):
            return None
        return f"training failed ({progress.code}) {TRIES} times; {self._owner.run_folder(request.id) / 'work.log'} says why"

    def _advance(self, request: ExpertRequest) -> None:
        if not self._owner.seeds.has(request):
            self._fetch_seed(request)
        if not self._owner.is_trained(request):
            self._train(request)
            return
        self._report(request)
        self._deliver(request)

    def _wait(self, request: ExpertRequest, why: str) -> None:
        tries = self._tries.get(request.id, 0)
        self._tries[request.id] = tries + 1
        self._later[request.id] = time.monotonic() + RETRY_S[min(tries, len(RETRY_S) - 1)]
        self._say(request, why)

    def _say(self, request: ExpertRequest, text: str) -> None:
        """Say something once, until something else is to be said."""
        if self._said.get(request.id) != text:
            self._said[request.id] = text
            self._tell(f"request {request.id}: {text}")

    # --- the seed ---

    def _fetch_seed(self, request: ExpertRequest) -> None:
        self._say(request, f"fetching the seed, {sum(file.size for file in request.seed_files):,} bytes")
        for writer in self._owner.seeds.writers(request):
            for index in writer.missing():
                writer.put(index, self._client.seed_part(request.id, writer.file, index))
                self._pulse()
        self._owner.seeds.settle(request)

    # --- training ---

    def _train(self, request: ExpertRequest) -> None:
        """See to it that a process trains; one that ends again and again is started less and less often."""
        if not self._owner.is_working(request.id) or not self._owner.is_private_enough(request):
            progress, starts = self._owner.progress(request.id), self._starts.get(request.id, 0)
            log = self._owner.run_folder(request.id) / "work.log"
            if progress.state == "failed" and progress.code != "STOPPED":
                self._report(request)
                self._say(request, f"training failed ({progress.code}); {log} says why; it is tried again")
            elif starts > 1:
                self._say(
                    request, f"training has ended early {starts} times; {log} says why; it is tried again"
                )
            else:
                self._say(request, "training")
            self._owner.start(request.id)
            self._starts[request.id] = starts + 1
            self._later[request.id] = time.monotonic() + RETRY_S[min(starts, len(RETRY_S) - 1)]
        self._report(request)

    def _report(self, request: ExpertRequest) -> None:
        """Tell the coordinator how far the training is, when that has changed, and not too often."""
        progress, now = self._owner.progress(request.id), time.monotonic()
        at, before = self._told.get(request.id, (0.0, None))
        if progress == before or (
            before is not None and progress.state == before.state and now - at < TELL_S
        ):
            return
        self._client.progress(request.id, progress)
        self._told[request.id] = (now, progress)

    # --- delivering ---

    def _deliver(self, request: ExpertRequest) -> None:
        signed = self._delivery(request)
        if not self._agree(self._owner.review(request.id)):
            self._say(
                request,
                "the expert is ready and waits for your yes: look at it with --review, let it go with --yes",
            )
            self._later[request.id] = time.monotonic() + TELL_S
            return
        found = self._client.begin(request.id, signed)
        if "refusal" not in found:
            self._say(request, f"delivering {sum(file.size for file in signed.statement.files):,} bytes")
            self._send(request, signed, found["missing"])
            while (found := self._client.finish(request.id)).get("state") == "judging":
                self._pulse()
                time.sleep(JUDGED_S)
        refusal = found.get("refusal")
        self._owner.note_outcome(request.id, refusal)
        self._say(request, "accepted" if refusal is None else f"refused: {refusal}")

    def _delivery(self, request: ExpertRequest) -> Signed:
        """Return what is delivered, in parts of which a cut costs at most one in 64."""
        folder = self._owner.delivery_folder(request.id)
        if not (folder / "delivery.json").is_file():
            expert = self._owner.expert_folder(request)
            make_delivery(expert, request, self._owner.key(), folder, part_size=part_size(_size(expert)))
        return self._owner.delivery(request.id)

    def _send(self, request: ExpertRequest, signed: Signed, missing: dict[str, list[int]]) -> None:
        folder = self._owner.delivery_folder(request.id)
        files: dict[str, FileParts] = {file.name: file for file in signed.statement.files}
        for name, indices in missing.items():
            for index in indices:
                self._client.put(request.id, files[name], index, read_part(folder / name, files[name], index))
                self._pulse()


def part_size(total: int) -> int:
    """Return the size of the parts in which so many bytes are sent: a 64th, from 1 MiB to 64 MiB."""
    return max(SMALLEST_PART, min(PART_BYTES, -(-total // PARTS_OF_A_DELIVERY)))


def _size(folder: Path) -> int:
    return max((path.stat().st_size for path in folder.glob("*.safetensors")), default=0)
