"""The coordinator of a federation: decides what to request, and which deliveries to accept.

All state is on disk (`storage.py`), so a restart resumes where the process stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from ....core.artefacts.files import remove_tree
from ....core.artefacts.layout import Layout
from ....core.errors import UserError
from ....core.manifests.manifest import read_manifest
from ..judging.acceptance import Measure, Refusal, RefusalCode, Rules, refusal_of_statement
from ..protocol.delivery import SignedStatement
from ..protocol.parts import read_part
from ..protocol.requests import ExpertRequest, Recipe, new_identifier
from ..rounds.shared_model import SharedModel, shared_model, shared_models
from .destinations import ExpertsFolder, OpenRound
from .ledger import Entry, State
from .storage import NO_SUCH_REQUEST, FederationFiles


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
        self.files = FederationFiles(layout.root / "federation")

    # --- requests ---

    def ask(
        self, names: Sequence[str], recipe: Recipe, deadline: datetime, seed_folder: Path | None = None
    ) -> list[ExpertRequest]:
        """Request an expert from each owner without an accepted one; an open request gets the later deadline.

        Owners start from the seed in `seed_folder`, by default the workspace's. Raises `UserError` for an owner who is not a
        member and for a workspace without a seed.
        """
        members = [self.files.members.get(name) for name in names]
        start = seed_folder or self.layout.seed
        seed = digest_of_seed(start)
        missing = self.files.ledger.missing(seed, recipe.digest, names)
        seed_files = self.files.parts_of_seed(start)
        requests = []
        for member in members:
            if member.name not in missing:
                continue
            identifier, until = new_identifier(), deadline
            previous = self.open_request(member.name, seed, recipe.digest)
            if previous is not None:
                identifier, until = previous.id, max(deadline, previous.deadline)
            request = ExpertRequest(identifier, member.name, member.key.fingerprint, seed, seed_files, recipe, until)
            self.files.write_request(request)
            self._log("asked", request, until.isoformat(timespec="seconds"))
            requests.append(request)
        return requests

    def open_requests(self, name: str) -> list[ExpertRequest]:
        """Return an owner's requests without an accepted delivery whose deadline has not passed."""
        requests = [self.files.request(entry.request) for entry in self._open_entries(name)]
        return [request for request in requests if request.deadline > self.now() and self._is_current(request)]

    def open_request(self, name: str, seed: str, recipe: str) -> ExpertRequest | None:
        """Return an owner's request for this seed and recipe that has no accepted delivery, or None."""
        for entry in self._open_entries(name):
            if (entry.seed, entry.recipe) == (seed, recipe):
                return self.files.request(entry.request)
        return None

    def seed_folder(self, request: ExpertRequest) -> Path:
        """Return the folder of a request's seed; raises `UserError` if another seed has replaced it."""
        folder = self._destination(request).seed
        if digest_of_seed(folder) != request.seed:
            raise UserError(f"the seed of request {request.id} was replaced, or its round is over; ask again")
        return folder

    def request_of(self, name: str, request_id: str) -> ExpertRequest:
        """Return a request; raises `UserError` if it does not exist or belongs to another owner."""
        request = self.files.request(request_id)
        if request.owner != name:
            raise UserError(NO_SUCH_REQUEST)
        return request

    def seed_part(self, request: ExpertRequest, file: str, index: int) -> bytes:
        """Read one part of a file of a request's seed."""
        for parts in request.seed_files:
            if parts.name == file:
                return read_part(self.seed_folder(request) / file, parts, index)
        raise UserError(f"the seed has no file '{file:.80}'")

    def shared_models(self) -> dict[str, SharedModel]:
        """Return the shared models of this federation, by name."""
        return shared_models(self.files.shared_root)

    def has_later_rounds(self, name: str) -> bool:
        """Return whether an owner takes part in a shared model that is not finished."""
        models = self.shared_models().values()
        return any(name in shared.rounds.plan.owners and not shared.is_finished for shared in models)

    # --- deliveries ---

    def begin(self, request: ExpertRequest, signed: SignedStatement) -> Refusal | dict[str, list[int]]:
        """Judge a statement; return the missing parts by file name, or the refusal."""
        if self.files.ledger.state(request.id) == "accepted":  # the owner missed the verdict
            return {file.name: [] for file in signed.statement.files}
        refusal = self._refusal_of_statement(request, signed)
        if refusal is None:
            return self.files.announce(request.id, signed)
        self._refuse(request, refusal, signed)
        return refusal

    def finish(self, request: ExpertRequest) -> Refusal | None:
        """Judge a complete delivery: None after moving it to its destination, else the refusal, with the files in quarantine.

        Raises `UserError` while parts are missing. Idempotent after a success.
        """
        with self.files.locked(request.id, patience_s=600):
            if self.files.ledger.state(request.id) == "accepted":
                return None
            signed = self.files.announced(request.id)
            refusal = self._refusal_of_statement(request, signed)
            if refusal is None:
                artefact = self.files.assemble(request.id, signed)
                self._log("delivered", request, delivery=signed.statement.expert)
                destination = self._destination(request)
                refusal = destination.judge(artefact, signed, request)
                if refusal is None:
                    self._log("accepted", request, destination.take(artefact, request), signed.statement.expert)
                    self.files.accept(request.id, signed)
                    return None
                remove_tree(artefact)
            self._refuse(request, refusal, signed)
            return refusal

    def _refusal_of_statement(self, request: ExpertRequest, signed: SignedStatement) -> Refusal | None:
        member = self.files.members.get(request.owner)
        if self.now() > request.deadline:
            return Refusal(RefusalCode.LATE)
        refusal = refusal_of_statement(signed, request, member.key, self.rules)
        if refusal is not None:
            return refusal
        # two shared models that start from the same seed have the same first round
        repeats = {(request.owner, request.seed)} if request.recipe.round is not None else set()
        accepted = self.files.ledger.accepted_from(signed.statement.expert)
        return Refusal(RefusalCode.REPLAY) if accepted - repeats else None

    def _refuse(self, request: ExpertRequest, refusal: Refusal, signed: SignedStatement) -> None:
        self._log("refused", request, str(refusal), signed.statement.expert)
        self.files.quarantine(request, refusal)

    # --- helpers ---

    def _open_entries(self, name: str) -> list[Entry]:
        """Return the latest ledger entries of an owner's requests that have no accepted delivery."""
        return [entry for entry in self.files.ledger.states_of(name).values() if entry.state != "accepted"]

    def _destination(self, request: ExpertRequest) -> ExpertsFolder | OpenRound:
        round_ = request.recipe.round
        if round_ is None:
            return ExpertsFolder(self.layout, self.rules, self._measure)
        return OpenRound(shared_model(self.files.shared_root, round_.model), self.rules, self._measure, self.now)

    def _is_current(self, request: ExpertRequest) -> bool:
        """Return whether a request is for an expert or for an open round."""
        round_ = request.recipe.round
        if round_ is None:
            return True
        shared = self.shared_models().get(round_.model)
        return shared is not None and (shared.identifier, shared.rounds.number) == (round_.rounds, round_.number)

    def _log(self, state: State, request: ExpertRequest, detail: str = "", delivery: str = "") -> None:
        at = self.now().isoformat(timespec="seconds")
        entry = Entry(state, request.id, request.owner, request.seed, request.recipe.digest, at, detail, delivery)
        self.files.ledger.add(entry)


def digest_of_seed(folder: Path) -> str:
    """Return the digest of a finished seed; raises `UserError` if there is none."""
    if not (folder / "seed.json").is_file():
        raise UserError("there is no finished seed; make one with `expertctl seed`")
    return read_manifest(folder).digest
