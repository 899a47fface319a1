"""Work of an owner's process on each request: fetch the seed, train, review and deliver; every step is resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from ....core.errors import UserError
from ....core.reporting import Reporter
from ....experts.federation.owner.owner import LOG_FILE, Owner, Review
from ....experts.federation.protocol.delivery import SignedStatement
from ....experts.federation.protocol.keys import PUBLIC_FILE
from ....experts.federation.protocol.parts import PART_BYTES, read_part
from ....experts.federation.protocol.requests import ExpertRequest, FailureCode, Progress
from ..processes.child import backoff_s
from .coordinator_client import CoordinatorClient, Declined, Unreachable

PROGRESS_INTERVAL_S = 5.0
"""Shortest time between two progress messages about one request, in seconds."""
TRIES = 3
"""Failed training runs after which `join --once` gives up."""
VERDICT_INTERVAL_S = 2.0
"""Seconds between two questions for the verdict."""
PARTS_OF_A_DELIVERY = 64
SMALLEST_PART = 1 << 20

Consent = Callable[[Review], bool]
"""Asks the owner whether a delivery may leave."""


class Stopped(Exception):
    """The owner wants to stop taking part."""


class OwnerWork:
    """Work on one owner's requests: `step` advances each of them, and reports progress between transfers."""

    def __init__(
        self,
        owner: Owner,
        client: CoordinatorClient,
        consent: Consent,
        reporter: Reporter,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._owner, self._client, self._consent, self._reporter = owner, client, consent, reporter
        self._stopped = stopped
        self._wait_until: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        """Failed attempts in a row, by request."""
        self._starts: dict[str, int] = {}
        """Started training processes, by request."""
        self._reported: dict[str, tuple[float, Progress]] = {}
        """Time and content of the last progress message, by request."""
        self._sent: set[str] = set()
        """Requests whose delivery is complete and awaits the verdict."""
        self._said: dict[str, str] = {}
        self._described: set[tuple[str, str]] = set()
        """Requests that were shown, with the digests of their recipes."""
        self._closed: dict[str, FailureCode] = {}
        """Codes that the coordinator was told, by request that the owner does not carry out."""

    def step(self) -> None:
        """Advance every request by one step; training is only for as many at a time as the owner's policy allows."""
        self._owner.drop_superseded()
        requests = sorted(self._owner.requests(), key=lambda request: request.turn)
        untrained = [
            request.id for request in requests if not (self.is_over(request) or self._owner.is_trained(request))
        ]
        turns = untrained[: self._owner.max_parallel()]
        for request in requests:
            if (request.id, request.recipe.digest) not in self._described:
                self._described.add((request.id, request.recipe.digest))
                self._say(request, self._owner.describe(request))
            if (objection := self._owner.objection(request)) is not None:
                self._say(request, objection)
                self._close(request, "POLICY")
            elif self._owner.outcome(request) == "DECLINED":
                self._close(request, "DECLINED")
            if request.id in untrained and request.id not in turns:
                self._owner.stop(request)  # it goes on from its last checkpoint
                self._say(request, "waits until training for others has ended")
                continue
            if self.is_over(request):
                self._owner.stop(request)  # after its deadline
                continue
            if time.monotonic() < self._wait_until.get(request.id, 0.0):
                continue
            try:
                self._advance(request)
                self._failures.pop(request.id, None)
            except Stopped:
                return
            except Unreachable as error:
                self._retry_later(request, f"the coordinator cannot be reached ({error}); trying again")
            except Declined as error:
                sentence = error.sentence(self._owner.state / PUBLIC_FILE)
                if error.code == "UNKNOWN_KEY":
                    raise UserError(sentence) from None
                self._retry_later(request, f"{sentence}; trying again")

    def withdraw_unlisted(self, listed: Collection[str], as_of: float) -> None:
        """End the training for requests that the coordinator does not list any more.

        `as_of` is when the list was asked for, in seconds since the epoch: later requests may be missing from it. Experts
        that are trained are delivered, since the coordinator may have accepted them already.
        """
        for request in self._owner.requests():
            is_known = self._owner.stored_at(request) < as_of - 1
            if (
                is_known
                and request.id not in listed
                and not self.is_over(request)
                and not self._owner.is_trained(request)
            ):
                self._owner.close(request, "WITHDRAWN")
                self._say(request, "the coordinator has withdrawn it, or its deadline has passed there")

    def stop_all(self) -> None:
        """End all training; it goes on from its last checkpoints if it is started again."""
        for request in self._owner.requests():
            self._owner.stop(request)

    def _close(self, request: ExpertRequest, code: FailureCode) -> None:
        """End the training for a request that the owner does not carry out, and tell the coordinator once."""
        self._owner.stop(request)
        if self._closed.get(request.id) != code:
            with suppress(Unreachable, Declined):
                self._client.progress(request.id, Progress("failed", code=code))
                self._closed[request.id] = code

    def is_over(self, request: ExpertRequest) -> bool:
        """Return whether a request is closed: delivered, refused, past its deadline or against the owner's settings."""
        return (
            self._owner.outcome(request) is not None
            or request.deadline < datetime.now(UTC)
            or self._owner.objection(request) is not None
        )

    def repeated_failure(self, request: ExpertRequest) -> str | None:
        """Return a message if training has failed `TRIES` times and has stopped, else None."""
        progress = self._owner.progress(request)
        has_failed = progress.state == "failed" and progress.code != "STOPPED"
        if not has_failed or self._starts.get(request.id, 0) < TRIES or self._owner.is_working(request):
            return None
        return f"training failed ({progress.code}) {TRIES} times; see {self._log_file(request)}"

    def _advance(self, request: ExpertRequest) -> None:
        if not self._owner.seeds.has(request):
            self._fetch_seed(request)
        if not self._owner.is_trained(request):
            self._train(request)
            return
        self._report(request)
        self._deliver(request)

    def _retry_later(self, request: ExpertRequest, reason: str) -> None:
        failures = self._failures[request.id] = self._failures.get(request.id, 0) + 1
        self._wait_until[request.id] = time.monotonic() + backoff_s(failures)
        self._say(request, reason)

    def _log_file(self, request: ExpertRequest) -> Path:
        return self._owner.run_folder(request) / LOG_FILE

    def _say(self, request: ExpertRequest, text: str) -> None:
        """Report a message about a request, unless it repeats the previous one."""
        if self._said.get(request.id) != text:
            self._said[request.id] = text
            self._reporter.say(f"request {request.id}: {text}")

    # --- the seed ---

    def _require_going_on(self) -> None:
        """Raise `Stopped` between two parts of a transfer; what was transferred is kept."""
        if self._stopped():
            raise Stopped

    def _fetch_seed(self, request: ExpertRequest) -> None:
        self._say(request, f"fetching the seed, {sum(file.size for file in request.seed_files):,} bytes")
        for writer in self._owner.seeds.writers(request):
            for index in writer.missing():
                self._require_going_on()
                writer.put(index, self._client.seed_part(request.id, writer.file, index))
                self._reporter.progress(f"fetching {writer.file.name}", index + 1, len(writer.file.parts), "parts")
        self._owner.seeds.complete(request)

    # --- training ---

    def _train(self, request: ExpertRequest) -> None:
        """Ensure that a training process runs; repeated starts are delayed by the back-off."""
        if not self._owner.is_working(request) or not self._owner.is_private_enough(request):
            progress, starts = self._owner.progress(request), self._starts.get(request.id, 0)
            log = self._log_file(request)
            if progress.state == "failed" and progress.code != "STOPPED":
                self._report(request)
                self._say(request, f"training failed ({progress.code}), see {log}; trying again")
            elif starts > 1:
                self._say(request, f"training has ended early {starts} times, see {log}; trying again")
            else:
                self._say(request, "training")
            self._owner.start(request)
            self._starts[request.id] = starts + 1
            self._wait_until[request.id] = time.monotonic() + backoff_s(starts + 1)
        self._report(request)

    def _report(self, request: ExpertRequest) -> None:
        """Send changed progress to the coordinator: a new state at once, else at most every `PROGRESS_INTERVAL_S` seconds."""
        progress, now = self._owner.progress(request), time.monotonic()
        sent_at, previous = self._reported.get(request.id, (0.0, None))
        if progress == previous or (
            previous is not None and progress.state == previous.state and now - sent_at < PROGRESS_INTERVAL_S
        ):
            return
        self._client.progress(request.id, progress)
        self._reported[request.id] = (now, progress)

    # --- delivering ---

    def _deliver(self, request: ExpertRequest) -> None:
        """Send a delivery if the owner consents, and ask for the verdict, in later steps again if it takes a while."""
        refusal = None
        if request.id not in self._sent:
            files = self._owner.expert_folder(request).glob("*.safetensors")
            signed = self._owner.delivery(request, part_size=part_size(max(file.stat().st_size for file in files)))
            if not self._consent(self._owner.review(request)):
                self._say(
                    request,
                    "the expert is ready and waits for your consent: inspect it with --review, send it with --yes",
                )
                self._wait_until[request.id] = time.monotonic() + PROGRESS_INTERVAL_S
                return
            begun = self._client.begin(request.id, signed)
            refusal = begun.refusal
            if refusal is None:
                self._say(request, f"delivering {sum(file.size for file in signed.statement.files):,} bytes")
                self._send(request, signed, begun.missing)
        if refusal is None:
            self._sent.discard(request.id)  # if this fails, the delivery is begun again
            verdict = self._client.finish(request.id)
            if verdict.state == "judging":
                self._sent.add(request.id)
                self._wait_until[request.id] = time.monotonic() + VERDICT_INTERVAL_S
                return
            refusal = verdict.refusal
        self._owner.note_outcome(request, refusal)
        self._say(request, "accepted" if refusal is None else f"refused: {refusal}")

    def _send(self, request: ExpertRequest, signed: SignedStatement, missing: Mapping[str, Sequence[int]]) -> None:
        folder, files = self._owner.delivery_folder(request), {file.name: file for file in signed.statement.files}
        for name, indices in missing.items():
            if name not in files or any(index >= len(files[name].parts) for index in indices):
                raise Unreachable("it asks for parts that were not announced")
            for index in sorted(set(indices)):
                self._require_going_on()
                self._client.put(request.id, files[name], index, read_part(folder / name, files[name], index))
                self._reporter.progress(f"delivering {name}", index + 1, len(files[name].parts), "parts")


def part_size(total: int) -> int:
    """Return the part size for a file of `total` bytes: a 64th of it, between 1 MiB and 64 MiB."""
    return max(SMALLEST_PART, min(PART_BYTES, -(-total // PARTS_OF_A_DELIVERY)))
