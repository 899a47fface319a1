"""Storage of a federation: the coordinator's files, without any decision about them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

from ....core.artefacts.digests import digest_of_file
from ....core.artefacts.files import exclusive, inside, new_folder, read_json, remove_tree, write_json
from ....core.errors import UserError
from ....core.manifests.manifest import read_manifest
from ..judging.refusal import Refusal
from ..protocol.delivery import DELIVERY_FILE, SignedStatement
from ..protocol.parts import FileParts, PartsWriter, parts_of
from ..protocol.requests import ExpertRequest, Progress, is_identifier
from .ledger import Ledger
from .members import Members, Presence

QUARANTINED = 3
"""Refused deliveries of a request that are kept."""
NO_SUCH_REQUEST = "there is no such request; ask the coordinator for a new one"


class FederationFiles:
    """The files in `federation/` of a workspace; every call reads the disk, so that several processes agree.

    members.json   ledger.jsonl   requests/ID.json   incoming/ID/ (delivery in transfer)   accepted/ID.json (statement)
    quarantine/ID-N/ (refused)   handed/ID.json (reply of the owner's node)   progress/ID.json   seed-DIGEST.json (parts)
    network/   shared/NAME/ (shared models)
    """

    def __init__(self, root: Path) -> None:
        self.root, self.shared_root = root, root / "shared"
        self.members = Members(root / "members.json")
        self.ledger = Ledger(root / "ledger.jsonl")
        self.presence = Presence(root / "network" / "heard.json")

    # --- requests ---

    def request(self, identifier: str) -> ExpertRequest:
        """Return a request by its identifier; raises `UserError` if it does not exist."""
        path = self._path("requests", identifier)
        if not is_identifier(identifier) or not path.is_file():
            raise UserError(NO_SUCH_REQUEST)
        return ExpertRequest.of_json(read_json(path))

    def write_request(self, request: ExpertRequest) -> None:
        path = self._new_path("requests", request.id)
        for folder in ("incoming", "accepted", ".locks"):  # of its delivery
            (self.root / folder).mkdir(exist_ok=True, mode=0o700)
        write_json(path, request.as_json())

    def record_handout(self, request_id: str, code: str, at: datetime) -> None:
        """Store an owner node's reply to a request: `TAKEN`, or the code of an error."""
        write_json(self._new_path("handed", request_id), {"code": code, "at": at.isoformat(timespec="seconds")})

    def handout(self, request_id: str) -> str:
        """Return the reply of the owner's node; `TAKEN` if there is none."""
        path = self._path("handed", request_id)
        return str(read_json(path)["code"]) if path.is_file() else "TAKEN"

    def record_progress(self, request_id: str, progress: Progress, at: datetime) -> None:
        """Store the latest progress of a request's training run."""
        content = {**progress.as_json(), "at": at.isoformat(timespec="seconds")}
        write_json(self._new_path("progress", request_id), content)

    def progress(self, request_id: str) -> tuple[Progress | None, datetime | None]:
        """Return the latest progress of a request's training run, and its time."""
        path = self._path("progress", request_id)
        if not path.is_file():
            return None, None
        content = read_json(path)
        at = datetime.fromisoformat(content.pop("at"))
        return Progress.of_json(content), at

    def parts_of_seed(self, folder: Path) -> tuple[FileParts, ...]:
        """Return the seed's files that an owner needs, in parts; the seed's training state is left out."""
        manifest = digest_of_file(folder / "seed.json")  # seeds with equal tensors may differ in other files
        cache = self.root / f"seed-{manifest[:16]}.json"
        if cache.is_file():
            return tuple(FileParts.of_json(file) for file in read_json(cache)["files"])
        names = [*read_manifest(folder).files, "seed.json"]
        files = tuple(parts_of(folder / name) for name in sorted(names) if "/" not in name)
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(cache, {"files": [file.as_json() for file in files]})
        return files

    # --- deliveries ---

    def locked(self, request_id: str, patience_s: float = 5.0) -> AbstractContextManager[None]:
        """Return the lock of a request's delivery."""
        return exclusive(inside(self.root, ".locks", request_id), "this delivery", patience_s=patience_s)

    def incoming_root(self) -> Path:
        """Return the folder of all deliveries in transfer."""
        folder = self.root / "incoming"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def incoming(self, request_id: str) -> Path:
        """Return the folder of a delivery in transfer."""
        return inside(self.root, "incoming", request_id)

    def announce(self, request_id: str, signed: SignedStatement) -> dict[str, list[int]]:
        """Store the statement of a delivery and return the missing parts by file name.

        Parts that arrived under another statement are deleted, since they are from an earlier training run.
        """
        folder = self.incoming(request_id)
        with self.locked(request_id):
            statement_file = folder / DELIVERY_FILE
            if statement_file.is_file() and read_json(statement_file) != signed.as_json():
                remove_tree(folder)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_json(statement_file, signed.as_json())
        return {file.name: PartsWriter(folder, file).missing() for file in signed.statement.files}

    def announced(self, request_id: str) -> SignedStatement:
        """Return the statement of a delivery in transfer; raises `UserError` if there is none."""
        folder = self.incoming(request_id)
        if not (folder / DELIVERY_FILE).is_file():
            raise UserError("the delivery was not announced; begin the delivery first")
        return SignedStatement.read(folder)

    def put(self, request_id: str, file: str, index: int, data: bytes) -> None:
        """Store one part; raises `UserError` if it was not announced or its bytes differ from the announcement."""
        for parts in self.announced(request_id).statement.files:
            if parts.name == file:
                with self.locked(request_id):
                    PartsWriter(self.incoming(request_id), parts).put(index, data)
                return
        raise UserError(f"the delivery announces no file '{file:.80}'")

    def assemble(self, request_id: str, signed: SignedStatement) -> Path:
        """Link a delivery's files into an artefact's folder and return it; raises `UserError` while parts are missing."""
        folder = self.incoming(request_id)
        for file in signed.statement.files:
            PartsWriter(folder, file).finish()
        artefact = folder.with_name(f"{request_id}-expert")
        with new_folder(artefact, force=True, what="delivery") as partial:
            for file in signed.statement.files:
                os.link(folder / file.name, partial / file.name)
        return artefact

    def accept(self, request_id: str, signed: SignedStatement) -> None:
        """Store the statement of an accepted delivery and delete the transferred parts."""
        write_json(self._new_path("accepted", request_id), signed.as_json())
        remove_tree(self.incoming(request_id))

    def accepted(self) -> Iterator[tuple[ExpertRequest, SignedStatement]]:
        """Yield every request with an accepted delivery, and the owner's signed statement."""
        for path in sorted((self.root / "accepted").glob("*.json")):
            yield self.request(path.stem), SignedStatement.of_json(read_json(path))

    def quarantine(self, request: ExpertRequest, refusal: Refusal) -> None:
        """Move the files of a refused delivery into quarantine for inspection, with the reason; the latest of a request are kept."""
        folder, quarantine = self.incoming(request.id), self.root / "quarantine"
        if not folder.is_dir():
            return
        quarantine.mkdir(exist_ok=True, mode=0o700)
        earlier = sorted((int(path.name.rpartition("-")[2]), path) for path in quarantine.glob(f"{request.id}-*"))
        for _, path in earlier[: max(len(earlier) - QUARANTINED + 1, 0)]:
            remove_tree(path)
        number = earlier[-1][0] + 1 if earlier else 0
        target = folder.rename(quarantine / f"{request.id}-{number}")
        reason = {"code": refusal.code.name, "reason": str(refusal), "owner": request.owner}
        write_json(target / "reason.json", reason)

    # --- paths ---

    def _path(self, folder: str, request_id: str) -> Path:
        return inside(self.root, folder, f"{request_id}.json")

    def _new_path(self, folder: str, request_id: str) -> Path:
        """Return a path to write to, in folders that other users cannot read."""
        for parent in (self.root, self.root / folder):
            parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._path(folder, request_id)
