"""The coordinator of a federation: asks, receives, judges, and keeps. All of it is on disk, so that a restart loses nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from ....core.artefacts.files import exclusive, new_folder, read_json, remove_tree, write_json
from ....core.artefacts.layout import Layout
from ....core.artefacts.lineage import digest_of_file, read_manifest
from ....core.errors import UserError
from ..judging.acceptance import Measure, Refusal, RefusalCode, Rules, refusal_of_statement
from ..protocol.delivery import DELIVERY_FILE, Signed
from ..protocol.parts import FileParts, PartsWriter, parts_of, read_part
from ..protocol.progress import Progress
from ..protocol.requests import ExpertRequest, Recipe, is_identifier, new_identifier
from ..rounds.shared_model import SharedModel, shared_model, shared_models
from .destinations import AmongExperts, Destination, IntoRound
from .ledger import Entry, Ledger, State
from .members import Members
from .presence import Presence

FOLDER = "federation"
REQUEST_SUFFIX = ".json"


class Coordinator:
    """One federation, in `federation/` of a workspace."""

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

    # --- asking ---

    def ask(
        self, names: Sequence[str], recipe: Recipe, deadline: datetime, seed_folder: Path | None = None
    ) -> list[ExpertRequest]:
        """Ask the owners who have not delivered; a request that is still open is renewed with the later deadline.

        They start from the workspace's seed, or from that in `seed_folder`. Raises `UserError` for a name that was not
        invited and for a workspace without a seed.
        """
        members = [self.members.named(name) for name in names]
        start = seed_folder or self.layout.seed
        seed = digest_of_seed(start)
        wanted = self.ledger.missing(seed, recipe.digest, [member.name for member in members])
        files = self._seed_files(start)
        found = []
        for member in members:
            if member.name not in wanted:
                continue
            old = self.latest(member.name, seed, recipe.digest)
            request = ExpertRequest(
                old.id if old is not None else new_identifier(),
                member.name,
                member.key.fingerprint,
                seed,
                files,
                recipe,
                max(deadline, old.deadline) if old is not None else deadline,
            )
            self._make_root()
            write_json(self._request_path(request.id), request.as_json())
            self._note("asked", request, request.deadline.isoformat(timespec="seconds"))
            found.append(request)
        return found

    def requests(self) -> list[ExpertRequest]:
        """Return every request that was ever made."""
        paths = sorted((self.root / "requests").glob(f"*{REQUEST_SUFFIX}"))
        return [ExpertRequest.of_json(read_json(path)) for path in paths]

    def request(self, identifier: str) -> ExpertRequest:
        """Return one request; raises `UserError` for one that was never made."""
        path = self._request_path(identifier)
        if not is_identifier(identifier) or not path.is_file():
            raise UserError("there is no such request; ask the coordinator to ask again")
        return ExpertRequest.of_json(read_json(path))

    def open_requests(self, name: str) -> list[ExpertRequest]:
        """Return what an owner is asked for and has not delivered, the deadline not having passed."""
        found = [
            self.request(entry.request)
            for entry in self.ledger.states_of(name).values()
            if entry.state != "accepted"
        ]
        return [request for request in found if request.deadline > self.now() and self._is_of_now(request)]

    def seed_folder(self, request: ExpertRequest) -> Path:
        """Return where the seed of a request lies; raises `UserError` where another one has taken its place."""
        folder = self._destination(request).seed
        if digest_of_seed(folder) != request.seed:
            raise UserError(
                f"the seed of request {request.id} is not there any more: it was made again, or its round is over; ask again"
            )
        return folder

    def seed_part(self, name: str, request_id: str, file: str, index: int) -> bytes:
        """Return a part of one of the files of the seed that an owner was asked to start from."""
        request = self._own(name, request_id)
        for parts in request.seed_files:
            if parts.name == file:
                return read_part(self.seed_folder(request) / file, parts, index)
        raise UserError("the seed has no such file")

    def shared_models(self) -> dict[str, SharedModel]:
        """Return the models that owners train together, by name."""
        return shared_models(self.shared_root)

    def has_more_for(self, name: str) -> bool:
        """Tell whether an owner will be asked again by itself: for a later round of a shared model."""
        return any(
            name in shared.rounds.plan.owners and not shared.is_finished
            for shared in self.shared_models().values()
        )

    @property
    def shared_root(self) -> Path:
        return self.root / "shared"

    def note_handed(self, request_id: str, code: str) -> None:
        """Keep what an owner's machine answered when it was handed a request: `TAKEN`, or why not."""
        (self.root / "handed").mkdir(exist_ok=True, mode=0o700)
        at = self.now().isoformat(timespec="seconds")
        write_json(self.root / "handed" / f"{request_id}.json", {"code": code, "at": at})

    # --- receiving ---

    def note_progress(self, name: str, request_id: str, progress: Progress) -> None:
        """Keep the last that an owner said of a training."""
        self._own(name, request_id)
        (self.root / "progress").mkdir(parents=True, exist_ok=True)
        write_json(
            self.root / "progress" / f"{request_id}.json",
            {**progress.as_json(), "at": self.now().isoformat(timespec="seconds")},
        )

    def begin(self, name: str, request_id: str, signed: Signed) -> Refusal | dict[str, list[int]]:
        """Judge a statement; return which parts of which files are still to come, or why none is wanted."""
        request = self._own(name, request_id)
        if self.ledger.state(request_id) == "accepted":  # and the owner has not heard of it
            return {file.name: [] for file in signed.statement.files}
        refusal = self._refusal_before(request, signed)
        if refusal is not None:
            self._refuse(request, refusal, signed)
            return refusal
        folder = self._incoming(request_id)
        with exclusive(self.root / ".locks" / request_id, "this delivery"):
            kept = folder / DELIVERY_FILE
            if kept.is_file() and read_json(kept) != signed.as_json():
                remove_tree(folder)  # the owner has trained again: nothing of the old one fits
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_json(kept, signed.as_json())
        return {file.name: PartsWriter(folder, file).missing() for file in signed.statement.files}

    def put(self, name: str, request_id: str, file: str, index: int, data: bytes) -> None:
        """Take in one part; raises `UserError` for one that was not announced or whose bytes are others."""
        self._own(name, request_id)
        folder = self._incoming(request_id)
        if not (folder / DELIVERY_FILE).is_file():
            raise UserError("nothing was announced; begin the delivery first")
        for parts in Signed.read(folder).statement.files:
            if parts.name == file:
                with exclusive(self.root / ".locks" / request_id, "this delivery"):
                    PartsWriter(folder, parts).put(index, data)
                return
        raise UserError("no such file was announced")

    def finish(self, name: str, request_id: str) -> Refusal | None:
        """Judge an expert whose parts are all there: take it into `experts/`, or put it into quarantine.

        Raises `UserError` while parts are missing. Called again after a success, it returns None again.
        """
        request = self._own(name, request_id)
        folder = self._incoming(request_id)
        with exclusive(self.root / ".locks" / request_id, "this delivery", patience_s=600):
            if self.ledger.state(request_id) == "accepted":
                return None
            if not (folder / DELIVERY_FILE).is_file():
                raise UserError("nothing was announced; begin the delivery first")
            signed = Signed.read(folder)
            refusal = self._refusal_before(request, signed)
            if refusal is None:
                for file in signed.statement.files:
                    PartsWriter(folder, file).finish()
                self._note("delivered", request, delivery=signed.statement.expert)
                bare = folder.with_name(f"{request_id}-expert")
                self._without_statement(folder, bare, signed)
                destination = self._destination(request)
                refusal = destination.judge(bare, signed, request)
                if refusal is None:
                    expert = destination.take(bare, request)
                    self._note("accepted", request, expert, signed.statement.expert)
                    write_json(self.root / "accepted" / f"{request_id}.json", signed.as_json())
                    remove_tree(folder)
                    return None
                remove_tree(bare)
            self._refuse(request, refusal, signed)
            return refusal

    def _refusal_before(self, request: ExpertRequest, signed: Signed) -> Refusal | None:
        member = self.members.named(request.owner)
        if self.now() > request.deadline:
            return Refusal(RefusalCode.LATE)
        seed_bytes = sum(file.size for file in request.seed_files)
        refusal = refusal_of_statement(signed, request, member.key, seed_bytes, self.rules)
        if refusal is None and self.ledger.deliverers(signed.statement.expert) - self._may_repeat(request):
            return Refusal(RefusalCode.REPLAY)
        return refusal

    def _may_repeat(self, request: ExpertRequest) -> set[tuple[str, str]]:
        """Return whose delivery may come once more: two shared models that begin alike have the same first round."""
        return {(request.owner, request.seed)} if request.recipe.round is not None else set()

    def _refuse(self, request: ExpertRequest, refusal: Refusal, signed: Signed) -> None:
        """Note a refusal and keep what there is of the delivery apart, for a human to look at."""
        self._note("refused", request, str(refusal), signed.statement.expert)
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

    def _without_statement(self, folder: Path, bare: Path, signed: Signed) -> None:
        """Give an artefact's folder: the delivery's files without what belongs to the delivery."""
        with new_folder(bare, force=True, what="delivery") as partial:
            for file in signed.statement.files:
                os.link(folder / file.name, partial / file.name)

    def _destination(self, request: ExpertRequest) -> Destination:
        part = request.recipe.round
        if part is None:
            return AmongExperts(self.layout, self.rules, self._measure)
        return IntoRound(shared_model(self.shared_root, part.model), self.rules, self._measure, self.now)

    def _is_of_now(self, request: ExpertRequest) -> bool:
        """Tell whether a request is for an expert, or for a round that is open."""
        part = request.recipe.round
        found = self.shared_models().get(part.model) if part is not None else None
        return part is None or (
            found is not None and (found.identifier, found.rounds.number) == (part.rounds, part.number)
        )

    def accepted(self) -> Iterator[tuple[ExpertRequest, Signed]]:
        """Yield every request whose delivery was taken, with what the owner signed."""
        for path in sorted((self.root / "accepted").glob(f"*{REQUEST_SUFFIX}")):
            yield self.request(path.stem), Signed.of_json(read_json(path))

    # --- places ---

    def _own(self, name: str, request_id: str) -> ExpertRequest:
        """Return a request if it is this owner's: nobody learns of another's."""
        request = self.request(request_id)
        if request.owner != name:
            raise UserError("there is no such request; ask the coordinator to ask again")
        return request

    def latest(self, name: str, seed: str, recipe: str) -> ExpertRequest | None:
        """Return the request for the same thing that was not accepted yet."""
        for entry in self.ledger.states_of(name).values():
            if (entry.seed, entry.recipe) == (seed, recipe) and entry.state != "accepted":
                return self.request(entry.request)
        return None

    def _note(self, state: State, request: ExpertRequest, detail: str = "", delivery: str = "") -> None:
        at = self.now().isoformat(timespec="seconds")
        self.ledger.add(
            Entry(state, request.id, request.owner, request.seed, request.recipe.digest, at, detail, delivery)
        )

    def _seed_files(self, folder: Path) -> tuple[FileParts, ...]:
        """Return the parts of what an owner needs of a seed: its files, without the state of its training."""
        digest_of_seed(folder)
        manifest = digest_of_file(folder / "seed.json")  # the same tensors may stand beside other files
        kept = self.root / f"seed-{manifest[:16]}.json"
        if kept.is_file():
            return tuple(FileParts.of_json(file) for file in read_json(kept)["files"])
        names = [*read_manifest(folder).files, "seed.json"]
        files = tuple(parts_of(folder / name) for name in sorted(names) if "/" not in name)
        self._make_root()
        write_json(kept, {"files": [file.as_json() for file in files]})
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
    """Return the digest of a finished seed; raises `UserError` where there is none."""
    if not (folder / "seed.json").is_file():
        raise UserError("there is no finished seed to hand out; make one with `expertctl seed`")
    return read_manifest(folder).digest
