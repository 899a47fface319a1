"""The coordinator of a federation: sends requests, receives deliveries, judges them and keeps accepted experts.

All state is on disk, so a restart resumes where the process stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from ....core.artefacts.digests import digest_of_file
from ....core.artefacts.files import exclusive, new_folder, read_json, remove_tree, write_json
from ....core.artefacts.layout import Layout
from ....core.errors import UserError
from ....core.manifests.manifest import read_manifest
from ..judging.acceptance import Measure, Refusal, RefusalCode, Rules, refusal_of_statement
from ..protocol.delivery import DELIVERY_FILE, SignedStatement
from ..protocol.parts import FileParts, PartsWriter, parts_of, read_part
from ..protocol.progress import Progress
from ..protocol.requests import ExpertRequest, Recipe, is_identifier, new_identifier
from ..rounds.shared_model import SharedModel, shared_model, shared_models
from .destinations import Destination, ExpertsFolder, OpenRound
from .ledger import Entry, Ledger, State
from .members import Members
from .presence import Presence

FOLDER = "federation"
REQUEST_SUFFIX = ".json"
NO_SUCH_REQUEST = "there is no such request; ask the coordinator for a new one"
NOT_ANNOUNCED = "the delivery was not announced; begin the delivery first"


class Coordinator:
    """Coordinator of one federation, stored in `federation/` of a workspace."""

    def __init__(
        self,
        layout: Layout,
        *,
        rules: Rules | None = None,
        measure: Measure = lambda seed, folder: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.layout, self.rules, self._measure, self.now = layout, rules or Rules(), measure, now
        self.root = layout.root / FOLDER
        self.members = Members(self.root / "members.json")
        self.ledger = Ledger(self.root / "ledger.jsonl")
        self.presence = Presence(self.root / "network" / "heard.json")

    # --- requests ---

    def ask(
        self, names: Sequence[str], recipe: Recipe, deadline: datetime, seed_folder: Path | None = None
    ) -> list[ExpertRequest]:
        """Request an expert from each owner without an accepted one; an open request gets the later deadline.

        Owners start from the seed in `seed_folder`, by default the workspace's. Raises `UserError` for an owner who is not a
        member and for a workspace without a seed.
        """
        members = [self.members.get(name) for name in names]
        start = seed_folder or self.layout.seed
        seed = digest_of_seed(start)
        missing = self.ledger.missing(seed, recipe.digest, [member.name for member in members])
        files = self._seed_files(start)
        requests = []
        for member in members:
            if member.name not in missing:
                continue
            previous = self.open_request(member.name, seed, recipe.digest)
            request = ExpertRequest(
                previous.id if previous is not None else new_identifier(),
                member.name,
                member.key.fingerprint,
                seed,
                files,
                recipe,
                max(deadline, previous.deadline) if previous is not None else deadline,
            )
            self._make_root()
            write_json(self._request_path(request.id), request.as_json())
            self._log("asked", request, request.deadline.isoformat(timespec="seconds"))
            requests.append(request)
        return requests

    def requests(self) -> list[ExpertRequest]:
        """Return all requests, including closed ones."""
        paths = sorted((self.root / "requests").glob(f"*{REQUEST_SUFFIX}"))
        return [ExpertRequest.of_json(read_json(path)) for path in paths]

    def request(self, identifier: str) -> ExpertRequest:
        """Return a request by its identifier; raises `UserError` if it does not exist."""
        path = self._request_path(identifier)
        if not is_identifier(identifier) or not path.is_file():
            raise UserError(NO_SUCH_REQUEST)
        return ExpertRequest.of_json(read_json(path))

    def open_requests(self, name: str) -> list[ExpertRequest]:
        """Return an owner's requests without an accepted delivery whose deadline has not passed."""
        requests = [
            self.request(entry.request) for entry in self.ledger.states_of(name).values() if entry.state != "accepted"
        ]
        return [request for request in requests if request.deadline > self.now() and self._is_current(request)]

    def seed_folder(self, request: ExpertRequest) -> Path:
        """Return the folder of a request's seed; raises `UserError` if another seed has replaced it."""
        folder = self._destination(request).seed
        if digest_of_seed(folder) != request.seed:
            raise UserError(f"the seed of request {request.id} was replaced, or its round is over; ask again")
        return folder

    def seed_part(self, name: str, request_id: str, file: str, index: int) -> bytes:
        """Read one part of a file of the seed that belongs to an owner's request."""
        request = self._request_of(name, request_id)
        for parts in request.seed_files:
            if parts.name == file:
                return read_part(self.seed_folder(request) / file, parts, index)
        raise UserError(f"the seed has no file '{file:.80}'")

    def shared_models(self) -> dict[str, SharedModel]:
        """Return the shared models of this federation, by name."""
        return shared_models(self.shared_root)

    def has_later_rounds(self, name: str) -> bool:
        """Return whether an owner takes part in a shared model that is not finished."""
        return any(
            name in shared.rounds.plan.owners and not shared.is_finished for shared in self.shared_models().values()
        )

    @property
    def shared_root(self) -> Path:
        return self.root / "shared"

    def record_handout(self, request_id: str, code: str) -> None:
        """Store an owner node's reply to a request: `TAKEN`, or a code that says why not."""
        (self.root / "handed").mkdir(exist_ok=True, mode=0o700)
        at = self.now().isoformat(timespec="seconds")
        write_json(self.root / "handed" / f"{request_id}.json", {"code": code, "at": at})

    # --- deliveries ---

    def record_progress(self, name: str, request_id: str, progress: Progress) -> None:
        """Store the latest progress of an owner's training run."""
        self._request_of(name, request_id)
        (self.root / "progress").mkdir(parents=True, exist_ok=True)
        write_json(
            self.root / "progress" / f"{request_id}.json",
            {**progress.as_json(), "at": self.now().isoformat(timespec="seconds")},
        )

    def begin(self, name: str, request_id: str, signed: SignedStatement) -> Refusal | dict[str, list[int]]:
        """Judge a statement; return the missing parts by file name, or the refusal."""
        request = self._request_of(name, request_id)
        if self.ledger.state(request_id) == "accepted":  # the owner missed the verdict
            return {file.name: [] for file in signed.statement.files}
        refusal = self._refusal_of_statement(request, signed)
        if refusal is not None:
            self._refuse(request, refusal, signed)
            return refusal
        folder = self._incoming(request_id)
        with exclusive(self.root / ".locks" / request_id, "this delivery"):
            statement_file = folder / DELIVERY_FILE
            if statement_file.is_file() and read_json(statement_file) != signed.as_json():
                remove_tree(folder)  # the owner has trained again, so no earlier part fits
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_json(statement_file, signed.as_json())
        return {file.name: PartsWriter(folder, file).missing() for file in signed.statement.files}

    def put(self, name: str, request_id: str, file: str, index: int, data: bytes) -> None:
        """Store one part; raises `UserError` if it was not announced or its bytes differ from the announcement."""
        self._request_of(name, request_id)
        folder = self._incoming(request_id)
        if not (folder / DELIVERY_FILE).is_file():
            raise UserError(NOT_ANNOUNCED)
        for parts in SignedStatement.read(folder).statement.files:
            if parts.name == file:
                with exclusive(self.root / ".locks" / request_id, "this delivery"):
                    PartsWriter(folder, parts).put(index, data)
                return
        raise UserError(f"the delivery announces no file '{file:.80}'")

    def finish(self, name: str, request_id: str) -> Refusal | None:
        """Judge a complete delivery: None after moving it to its destination, else the refusal, with the files in quarantine.

        Raises `UserError` while parts are missing. Idempotent after a success.
        """
        request = self._request_of(name, request_id)
        folder = self._incoming(request_id)
        with exclusive(self.root / ".locks" / request_id, "this delivery", patience_s=600):
            if self.ledger.state(request_id) == "accepted":
                return None
            if not (folder / DELIVERY_FILE).is_file():
                raise UserError(NOT_ANNOUNCED)
            signed = SignedStatement.read(folder)
            refusal = self._refusal_of_statement(request, signed)
            if refusal is None:
                for file in signed.statement.files:
                    PartsWriter(folder, file).finish()
                self._log("delivered", request, delivery=signed.statement.expert)
                artefact = folder.with_name(f"{request_id}-expert")
                self._link_artefact(folder, artefact, signed)
                destination = self._destination(request)
                refusal = destination.judge(artefact, signed, request)
                if refusal is None:
                    expert = destination.take(artefact, request)
                    self._log("accepted", request, expert, signed.statement.expert)
                    write_json(self.root / "accepted" / f"{request_id}.json", signed.as_json())
                    remove_tree(folder)
                    return None
                remove_tree(artefact)
            self._refuse(request, refusal, signed)
            return refusal

    def _refusal_of_statement(self, request: ExpertRequest, signed: SignedStatement) -> Refusal | None:
        member = self.members.get(request.owner)
        if self.now() > request.deadline:
            return Refusal(RefusalCode.LATE)
        seed_bytes = sum(file.size for file in request.seed_files)
        refusal = refusal_of_statement(signed, request, member.key, seed_bytes, self.rules)
        if refusal is None and self.ledger.accepted_from(signed.statement.expert) - self._allowed_repeats(request):
            return Refusal(RefusalCode.REPLAY)
        return refusal

    def _allowed_repeats(self, request: ExpertRequest) -> set[tuple[str, str]]:
        """Return the (owner, seed) pairs that may deliver the same weights again.

        Two shared models that start from the same seed have the same first round.
        """
        return {(request.owner, request.seed)} if request.recipe.round is not None else set()

    def _refuse(self, request: ExpertRequest, refusal: Refusal, signed: SignedStatement) -> None:
        """Record a refusal and move the delivery's files into quarantine for inspection."""
        self._log("refused", request, str(refusal), signed.statement.expert)
        folder = self._incoming(request.id)
        if not folder.is_dir():
            return
        quarantine = self.root / "quarantine"
        quarantine.mkdir(exist_ok=True, mode=0o700)
        number = sum(1 for _ in quarantine.glob(f"{request.id}-*"))
        target = quarantine / f"{request.id}-{number}"
        folder.rename(target)
        write_json(
            target / "reason.json",
            {"code": refusal.code.name, "reason": str(refusal), "owner": request.owner},
        )

    def _link_artefact(self, folder: Path, artefact: Path, signed: SignedStatement) -> None:
        """Link a delivery's files, without the statement, into an artefact's folder."""
        with new_folder(artefact, force=True, what="delivery") as partial:
            for file in signed.statement.files:
                os.link(folder / file.name, partial / file.name)

    def _destination(self, request: ExpertRequest) -> Destination:
        round_ = request.recipe.round
        if round_ is None:
            return ExpertsFolder(self.layout, self.rules, self._measure)
        return OpenRound(shared_model(self.shared_root, round_.model), self.rules, self._measure, self.now)

    def _is_current(self, request: ExpertRequest) -> bool:
        """Return whether a request is for an expert or for an open round."""
        round_ = request.recipe.round
        if round_ is None:
            return True
        shared = self.shared_models().get(round_.model)
        return shared is not None and (shared.identifier, shared.rounds.number) == (
            round_.rounds,
            round_.number,
        )

    def accepted(self) -> Iterator[tuple[ExpertRequest, SignedStatement]]:
        """Yield every request with an accepted delivery, and the owner's signed statement."""
        for path in sorted((self.root / "accepted").glob(f"*{REQUEST_SUFFIX}")):
            yield self.request(path.stem), SignedStatement.of_json(read_json(path))

    # --- helpers ---

    def _request_of(self, name: str, request_id: str) -> ExpertRequest:
        """Return an owner's request; raises the error for a missing one if it belongs to another owner."""
        request = self.request(request_id)
        if request.owner != name:
            raise UserError(NO_SUCH_REQUEST)
        return request

    def open_request(self, name: str, seed: str, recipe: str) -> ExpertRequest | None:
        """Return an owner's request for this seed and recipe that has no accepted delivery, or None."""
        for entry in self.ledger.states_of(name).values():
            if (entry.seed, entry.recipe) == (seed, recipe) and entry.state != "accepted":
                return self.request(entry.request)
        return None

    def _log(self, state: State, request: ExpertRequest, detail: str = "", delivery: str = "") -> None:
        at = self.now().isoformat(timespec="seconds")
        self.ledger.add(
            Entry(state, request.id, request.owner, request.seed, request.recipe.digest, at, detail, delivery)
        )

    def _seed_files(self, folder: Path) -> tuple[FileParts, ...]:
        """Return the seed's files that an owner needs, in parts; the seed's training state is left out."""
        digest_of_seed(folder)
        manifest = digest_of_file(folder / "seed.json")  # seeds with equal tensors may differ in other files
        cache = self.root / f"seed-{manifest[:16]}.json"
        if cache.is_file():
            return tuple(FileParts.of_json(file) for file in read_json(cache)["files"])
        names = [*read_manifest(folder).files, "seed.json"]
        files = tuple(parts_of(folder / name) for name in sorted(names) if "/" not in name)
        self._make_root()
        write_json(cache, {"files": [file.as_json() for file in files]})
        return files

    def _make_root(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("requests", "incoming", "accepted", ".locks"):
            (self.root / name).mkdir(exist_ok=True, mode=0o700)

    def _request_path(self, identifier: str) -> Path:
        return self.root / "requests" / f"{identifier}{REQUEST_SUFFIX}"

    def _incoming(self, request_id: str) -> Path:
        return self.root / "incoming" / request_id


def digest_of_seed(folder: Path) -> str:
    """Return the digest of a finished seed; raises `UserError` if there is none."""
    if not (folder / "seed.json").is_file():
        raise UserError("there is no finished seed; make one with `expertctl seed`")
    return read_manifest(folder).digest
