"""The coordinator of a federation: decides what to request, and which deliveries to accept.

All state is on disk (`storage.py`), so a restart resumes where the process stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from ....core.artefacts.files import exclusive, link_or_copy, remove_tree
from ....core.artefacts.layout import Layout, check_name
from ....core.artefacts.safetensors_io import SINGLE_FILE
from ....core.errors import UserError, unknown_name
from ....core.manifests.manifest import find_manifest, read_manifest
from ...runs.trainable import makes_adapter
from ..judging.acceptance import HeldOut, Measure, examine_expert, refusal_of_statement
from ..judging.delivered_tensors import side_files
from ..judging.refusal import Refusal, RefusalCode, Refused
from ..protocol.delivery import SignedStatement
from ..protocol.keys import PublicKey
from ..protocol.requests import ExpertRequest, Recipe, new_identifier
from ..protocol.rotation import KeyRotation
from ..rounds.shared_model import SETTINGS_FILE, SharedModel
from .ledger import Entry, State
from .members import Member
from .storage import NO_SUCH_REQUEST, FederationFiles

MOST_REFUSALS = 20
"""Refusals of one request, after which its deliveries are not examined until the owner is asked again."""


class Coordinator:
    """Coordinator of one federation, stored in `federation/` of a workspace."""

    def __init__(
        self,
        layout: Layout,
        *,
        measure: Measure = lambda seed, folder: None,
        judged_at_once: int = 1,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.layout, self._measure, self.now = layout, measure, now
        self.judged_at_once = judged_at_once
        """Number of deliveries that `measure` can score at a time."""
        self.files = FederationFiles(layout.root / "federation")

    # --- members ---

    def invite(self, name: str, key: PublicKey) -> Member:
        """Invite an owner and record it; raises `UserError` if another member has the name or the key."""
        is_new = all(member.name != name for member in self.files.members.all())
        member = self.files.members.add(name, key)
        if is_new:
            self._log_member("invited", member)
        return member

    def remove(self, name: str) -> None:
        """Remove a member and record it; accepted experts stay."""
        member = self.files.members.get(name)
        self.files.members.remove(name)
        self._log_member("removed", member)

    def rotate_key(self, rotation: KeyRotation) -> Member:
        """Give the member with the old key the new one, also in its open requests; raises `UserError` if it is not signed."""
        member = self.files.members.find_by_key(rotation.old)
        if member is None:
            raise UserError(f"no member has the key {rotation.old}; it may have been rotated already")
        new = rotation.verified(member.key)
        if new.fingerprint in self.files.ledger.known_keys():  # the server registers each key once, see `SuperLink`
            raise UserError("the new key was in use before; make another one")
        rotated = self.files.members.replace_key(member, new)
        for request in self.open_requests(member.name):
            self.files.write_request(replace(request, key=rotated.key.fingerprint))
        self._log_member("rotated", rotated)
        return rotated

    def _log_member(self, state: State, member: Member) -> None:
        at = self.now().isoformat(timespec="seconds")
        self.files.ledger.add(Entry(state, "", member.name, "", "", at, member.key.fingerprint))

    # --- requests ---

    def ask(
        self,
        names: Sequence[str],
        recipe: Recipe,
        deadline: datetime,
        seed_folder: Path | None = None,
        *,
        priority: int = 0,
    ) -> list[ExpertRequest]:
        """Request an expert from each owner without an accepted one; an open request gets the later deadline and the priority.

        Owners start from the seed in `seed_folder`, by default the workspace's. Raises `UserError` for an owner who is not a
        member and for a workspace without a seed.
        """
        if deadline <= self.now():
            raise UserError(f"the deadline {deadline.isoformat(timespec='seconds')} has passed; choose a later one")
        members = [self.files.members.get(name) for name in names]
        start = seed_folder or self.layout.seed
        seed = digest_of_seed(start)
        if makes_adapter(recipe.trains):
            side_files(recipe, start)  # raises for options that do not fit the seed
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
            request = ExpertRequest(
                identifier, member.name, member.key.fingerprint, seed, seed_files, recipe, until, priority
            )
            ExpertRequest.of_json(request.as_json())  # what owners would refuse to read is refused here
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

    def is_training_for_earlier_round(self, name: str, shared: SharedModel) -> bool:
        """Return whether an owner trains for a round before the open one, in which its weights can still count."""
        if not shared.rounds.plan.late_rounds:
            return False
        for request in self.open_requests(name):
            round_, (progress, _) = request.recipe.round, self.files.progress(request.id)
            if round_ is None or (round_.rounds, round_.number) == (shared.identifier, shared.rounds.number):
                continue
            is_under_way = progress is not None and progress.state in ("training", "ready")
            if round_.rounds == shared.identifier and is_under_way and self.files.ledger.state(request.id) != "refused":
                return True
        return False

    def withdraw(self, name: str) -> list[ExpertRequest]:
        """Withdraw an owner's open requests, whose training then ends; return them.

        An owner without an open request for a round is left out of it. Raises `UserError` if there are none.
        """
        self.files.members.get(name)
        requests = self.open_requests(name)
        if not requests:
            raise UserError(f"'{name}' has no open request; see `expertctl federate status`")
        for request in requests:
            self._log("withdrawn", request)
            if (round_ := request.recipe.round) is not None:
                withdrawn = RefusalCode.WITHDRAWN
                self.shared_model(round_.model).rounds.leave_out(name, withdrawn.name, withdrawn.value)
        return requests

    def seed_folder(self, request: ExpertRequest) -> Path:
        """Return the folder of a request's seed; raises `UserError` if another seed has replaced it."""
        round_ = request.recipe.round
        folder = self.layout.seed
        if round_ is not None:
            folder = self.shared_model(round_.model).seed_folder(round_.number)
        if digest_of_seed(folder) != request.seed:
            raise UserError(f"the seed of request {request.id} was replaced, or its round is over; ask again")
        return folder

    def request_of(self, name: str, request_id: str) -> ExpertRequest:
        """Return a request; raises `UserError` if it does not exist or belongs to another owner."""
        request = self.files.request(request_id)
        if request.owner != name:
            raise UserError(NO_SUCH_REQUEST)
        return request

    def seed_span(self, request: ExpertRequest, file: str, index: int) -> tuple[Path, int, int]:
        """Return where one part of a file of a request's seed is: path, first byte, and the byte after the last."""
        parts = next((parts for parts in request.seed_files if parts.name == file), None)
        if parts is None:
            raise UserError(f"the seed has no file '{file:.80}'")
        return self.seed_folder(request) / file, *parts.span(index)

    def shared_models(self) -> dict[str, SharedModel]:
        """Return the shared models of this federation, by name."""
        roots = sorted(path.parent for path in self.files.shared_root.glob(f"*/{SETTINGS_FILE}"))
        return {root.name: SharedModel(root) for root in roots}

    def shared_model(self, name: str) -> SharedModel:
        """Return a shared model by name; raises `UserError` if there is none."""
        models = self.shared_models()
        if name not in models:
            raise unknown_name("shared model", name, models)
        return models[name]

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
                judge = self._judge_expert if request.recipe.round is None else self._judge_weights
                try:
                    losses = judge(artefact, signed, request)
                except Refused as refused:
                    refusal = refused.refusal
                    remove_tree(artefact)
                else:
                    expert = signed.statement.expert
                    self._log("accepted", request, self._take(artefact, request), expert, losses)
                    self.files.accept(request.id, signed)
                    return None
            self._refuse(request, refusal, signed)
            return refusal

    def _refusal_of_statement(self, request: ExpertRequest, signed: SignedStatement) -> Refusal | None:
        member = self.files.members.get(request.owner)
        if self.files.ledger.state(request.id) == "withdrawn":
            return Refusal(RefusalCode.WITHDRAWN)
        if self.now() > request.deadline:
            return Refusal(RefusalCode.LATE)
        if self.files.ledger.refusals(request.id) >= MOST_REFUSALS:
            return Refusal(RefusalCode.TOO_OFTEN)
        refusal = refusal_of_statement(signed, request, member.key)
        if refusal is not None:
            return refusal
        # two shared models that start from the same seed have the same first round
        repeats = {(request.owner, request.seed)} if request.recipe.round is not None else set()
        accepted = self.files.ledger.accepted_from(signed.statement.expert)
        return Refusal(RefusalCode.REPLAY) if accepted - repeats else None

    def _refuse(self, request: ExpertRequest, refusal: Refusal, signed: SignedStatement) -> None:
        if refusal.code not in (
            RefusalCode.WITHDRAWN,
            RefusalCode.TOO_OFTEN,
        ):  # it stays withdrawn; refusals are bounded
            self._log("refused", request, str(refusal), signed.statement.expert)
        self.files.quarantine(request, refusal)

    def _judge_expert(self, folder: Path, signed: SignedStatement, request: ExpertRequest) -> HeldOut | None:
        seed = self.layout.seed
        return examine_expert(folder, signed, request, seed, lambda: self._measure(seed, folder))

    def _judge_weights(self, folder: Path, signed: SignedStatement, request: ExpertRequest) -> HeldOut | None:
        """Apply the checks of an expert, then those of the round; a refused owner is left out of the round."""
        round_ = request.recipe.round
        assert round_ is not None
        shared = self.shared_model(round_.model)
        rounds = shared.rounds
        if rounds.has_counted(request.owner, round_.number):  # the round closed before a restart sent the verdict
            return None
        if not shared.accepts(round_.number):
            raise Refused(RefusalCode.LATE)
        seed = shared.seed_folder(round_.number)

        def held_out() -> HeldOut | None:
            """Score the owner's weights with the configuration and tokenizer of the round's seed."""
            with TemporaryDirectory(prefix=".candidate-", dir=shared.root) as scratch:
                model = Path(scratch)
                for path in seed.iterdir():
                    if path.name not in (SINGLE_FILE, "seed.json"):
                        link_or_copy(path, model / path.name)
                link_or_copy(folder / SINGLE_FILE, model / SINGLE_FILE)
                return self._measure(seed, model)

        try:
            losses = examine_expert(folder, signed, request, seed, held_out)
        except Refused as refused:
            rounds.leave_out(request.owner, refused.refusal.code.name, str(refused.refusal))
            raise
        try:  # token count that the owner declares, to two significant digits
            weight = float(sum(domain.tokens for domain in read_manifest(folder).domains.values()))
        except (UserError, OverflowError):
            weight = 0.0
        refusal = rounds.deliver(request.owner, folder / SINGLE_FILE, weight, self.now(), number=round_.number)
        if refusal is not None:
            raise Refused(refusal.code, refusal.detail)
        return losses

    def _take(self, folder: Path, request: ExpertRequest) -> str:
        """Move an accepted expert to `experts/NAME`, with a number if the name exists; return its name or its round."""
        if request.recipe.round is not None:
            remove_tree(folder)  # the round has a copy of the weights
            return str(request.recipe.round)
        name, number = request.owner, 2
        with exclusive(self.layout.lock("accepted-experts"), "the accepted experts", patience_s=60):
            if (kept := self._taken_before(folder, request.owner)) is not None:
                remove_tree(folder)
                return kept
            while (self.layout.experts / name).exists():
                name, number = f"{request.owner}-{number}", number + 1
            self.layout.experts.mkdir(parents=True, exist_ok=True)
            folder.rename(self.layout.experts / check_name(name, "an expert"))
        return name

    def _taken_before(self, folder: Path, owner: str) -> str | None:
        """Return the name under which a kill left an accepted expert that the ledger does not know yet, or None."""
        digest, known = read_manifest(folder).digest, self.files.ledger.accepted_names()
        for path in sorted(self.layout.experts.glob(f"{owner}*")):
            manifest = find_manifest(path)
            if path.name not in known and manifest is not None and (manifest.owner, manifest.digest) == (owner, digest):
                return path.name
        return None

    # --- helpers ---

    def _open_entries(self, name: str) -> list[Entry]:
        """Return the latest ledger entries of an owner's requests that have no accepted delivery."""
        entries = self.files.ledger.states_of(name).values()
        return [entry for entry in entries if entry.state not in ("accepted", "withdrawn")]

    def _is_current(self, request: ExpertRequest) -> bool:
        """Return whether a request is for an expert, or for a round that its weights can still count in."""
        round_ = request.recipe.round
        if round_ is None:
            return True
        shared = self.shared_models().get(round_.model)
        return shared is not None and shared.identifier == round_.rounds and shared.accepts(round_.number)

    def _log(
        self,
        state: State,
        request: ExpertRequest,
        detail: str = "",
        delivery: str = "",
        losses: HeldOut | None = None,
    ) -> None:
        at = self.now().isoformat(timespec="seconds")
        recipe, public = request.recipe.digest, asdict(losses) if losses is not None else None
        self.files.ledger.add(
            Entry(state, request.id, request.owner, request.seed, recipe, at, detail, delivery, public)
        )


def digest_of_seed(folder: Path) -> str:
    """Return the digest of a finished seed; raises `UserError` if there is none."""
    if not (folder / "seed.json").is_file():
        raise UserError("there is no finished seed; make one with `expertctl seed`")
    return read_manifest(folder).digest
