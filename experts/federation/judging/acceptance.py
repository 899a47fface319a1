"""Whether what an owner delivered is taken: every check that can be made without the owner's text.

Files are read in pieces and tensors one beside the seed's, so that memory does not grow with the expert. Nothing that is delivered
can raise more than a refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from ....core.artefacts.files import read_json
from ....core.artefacts.lineage import MANIFEST_NAMES, Manifest, read_manifest, verify
from ....core.artefacts.safetensors_io import SINGLE_FILE, Checkpoint, torch_dtype
from ....core.errors import UserError, first_line
from ...runs.trainable import changeable
from ..protocol.delivery import Signed
from ..protocol.keys import PublicKey
from ..protocol.requests import ExpertRequest

if TYPE_CHECKING:
    from torch import Tensor

MAX_BESIDE = 4
"""Files of tensors beside the expert's own: a router row, a domain embedding."""


class RefusalCode(Enum):
    """Why a delivery is not taken; codes travel, sentences stay with whoever reads them."""

    SIGNATURE = "the statement is not signed by the owner's key"
    SOMEONE_ELSES = "the statement is for another request, owner, seed or recipe"
    REPLAY = "the same expert was accepted before"
    LATE = "the deadline has passed"
    FILES = "files are missing, or there are some that no expert has"
    TOO_LARGE = "it is larger than an expert of this seed can be"
    DIGEST = "its bytes are not what its manifest says"
    MANIFEST = "its manifest is not that of the expert that was asked for"
    SHAPES = "a tensor is none of the seed's, or of another shape"
    DTYPES = "a tensor is of another dtype than the seed's"
    FROZEN = "a tensor differs from the seed's that was to stay"
    NOT_FINITE = "a tensor has numbers that are not finite"
    NORM = "a tensor has moved further from the seed's than training takes it"
    PRIVACY = "it was trained with less privacy than was asked for"
    HELD_OUT = "it is too bad at public text"


@dataclass(frozen=True)
class Refusal:
    """Why one delivery is not taken."""

    code: RefusalCode
    detail: str = ""
    """What exactly, for the coordinator."""

    def __str__(self) -> str:
        return f"{self.code.value}{f' ({self.detail})' if self.detail else ''}"


@dataclass(frozen=True)
class Rules:
    """Bounds that a delivery is held to."""

    max_change: float = 3.0
    """Most that a tensor may change, as length of the difference against the seed's tensor. Training moves them by less than
    their own length; weights that were scaled up by four or more are further away."""
    max_beside: float = 100.0
    """Largest root mean square of a tensor beside the expert's own."""
    size_slack: int = 64 << 20
    """Bytes that an expert may have beyond the seed's."""
    held_out: float = 2.0
    """Most that the loss on public text may be, times the seed's."""


@dataclass(frozen=True)
class HeldOut:
    """Losses on the coordinator's public text, in one unit."""

    seed: float
    expert: float


Measure = Callable[[Path, Path], HeldOut | None]
"""Scores the folders of a seed and of what was made of it; None where there is no public text."""


class _Refused(Exception):
    def __init__(self, code: RefusalCode, detail: str = "") -> None:
        super().__init__(code.name)
        self.refusal = Refusal(code, detail)


def refusal_of_statement(
    signed: Signed, request: ExpertRequest, key: PublicKey, seed_bytes: int, rules: Rules
) -> Refusal | None:
    """Judge a statement before a byte of the expert has come; None: it may come."""
    statement = signed.statement
    if not key.verify(statement.signed_bytes, signed.signature):
        return Refusal(RefusalCode.SIGNATURE)
    expected = (request.id, request.owner, request.seed, request.recipe.digest)
    if (statement.request, statement.owner, statement.seed, statement.recipe) != expected:
        return Refusal(RefusalCode.SOMEONE_ELSES)
    names = [file.name for file in statement.files]
    tensors = [name for name in names if name.endswith(".safetensors")]
    others = sorted(set(names) - set(tensors))
    if SINGLE_FILE not in names or others != sorted(["run.json", MANIFEST_NAMES["expert"]]):
        return Refusal(RefusalCode.FILES, ", ".join(names)[:200])
    if len(tensors) > 1 + MAX_BESIDE:
        return Refusal(RefusalCode.FILES, f"{len(tensors)} files of tensors")
    total = sum(file.size for file in statement.files)
    if total > seed_bytes + rules.size_slack:
        return Refusal(RefusalCode.TOO_LARGE, f"{total:,} bytes; the seed has {seed_bytes:,}")
    return None


def refusal_of_expert(
    folder: Path,
    signed: Signed,
    request: ExpertRequest,
    seed: Path,
    rules: Rules,
    held_out: Callable[[], HeldOut | None] = lambda: None,
) -> Refusal | None:
    """Judge an expert whose files are all there; None: it is taken. `held_out` is called only if all else is good."""
    try:
        manifest = _checked_manifest(folder, signed, request)
        _check_privacy(manifest, request)
        _check_tensors(folder, manifest, seed, rules)
        _check_beside(folder, rules)
        losses = held_out()
    except _Refused as refused:
        return refused.refusal
    if (
        losses is not None and not losses.expert <= rules.held_out * losses.seed
    ):  # also for one that is no number
        own = f"{losses.expert:.3f}" if losses.expert == losses.expert else "it cannot be scored"
        return Refusal(RefusalCode.HELD_OUT, f"{own}; the seed has {losses.seed:.3f}")
    return None


def _checked_manifest(folder: Path, signed: Signed, request: ExpertRequest) -> Manifest:
    try:
        problems = verify(folder)
        manifest = read_manifest(folder)
        run = read_json(folder / "run.json")
    except (UserError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise _Refused(RefusalCode.DIGEST, first_line(error).replace(str(folder), "it")) from None
    if problems:
        raise _Refused(RefusalCode.DIGEST, problems[0])
    seeds = [parent.digest for parent in manifest.parents if parent.kind == "seed"]
    said = {
        "kind": (manifest.kind, "expert"),
        "owner": (manifest.owner, request.owner),
        "seed": (seeds, [request.seed]),
        "trainer": (manifest.trainable, request.recipe.trains),
        "digest": (manifest.digest, signed.statement.expert),
        "run": (run.get("trains"), request.recipe.trains),
    }
    for what, (found, expected) in said.items():
        if found != expected:
            raise _Refused(RefusalCode.MANIFEST, f"{what} is {found!r:.100}")
    return manifest


def _check_privacy(manifest: Manifest, request: ExpertRequest) -> None:
    wanted = request.recipe.privacy
    if wanted is None:
        return
    spent = manifest.data.get("privacy")
    try:
        good = spent is not None and all(
            float(spent[name]) <= float(wanted[name]) for name in ("epsilon", "delta")
        )
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise _Refused(RefusalCode.PRIVACY)


def _check_tensors(folder: Path, manifest: Manifest, seed: Path, rules: Rules) -> None:
    """Hold every tensor against the seed's of its name."""
    own, base = Checkpoint([folder / SINGLE_FILE]), Checkpoint.of_folder(seed)
    model_type = str(read_json(seed / "config.json").get("model_type"))
    movable = changeable(str(manifest.trainable), base, model_type)
    seed_digests = read_manifest(seed).tensors
    if not list(own):
        raise _Refused(RefusalCode.FILES, "it has no tensor")
    for name in own:
        if name not in base:
            raise _Refused(RefusalCode.SHAPES, f"the seed has no '{name:.100}'")
        entry, before = own.entry(name), base.entry(name)
        if entry.shape != before.shape:
            raise _Refused(
                RefusalCode.SHAPES, f"'{name}' is {list(entry.shape)}, the seed's {list(before.shape)}"
            )
        if entry.dtype != before.dtype:
            raise _Refused(RefusalCode.DTYPES, f"'{name}' is {entry.dtype}, the seed's {before.dtype}")
        if name not in movable and own.digest(name) != seed_digests.get(name):
            raise _Refused(RefusalCode.FROZEN, f"'{name}'")
        change = relative_change(own, base, name)
        if not change <= rules.max_change:
            raise _Refused(
                RefusalCode.NORM, f"'{name}' by {change:.3g} of its length; {rules.max_change:g} is allowed"
            )


def relative_change(own: Checkpoint, base: Checkpoint, name: str) -> float:
    """Return the length of a tensor's difference from the seed's, divided by that of the seed's.

    A seed's tensor without length counts as one of ones. Reads both in pieces.
    """
    moved = length = count = 0.0
    kind = own.entry(name).dtype
    for mine, theirs in zip(own.chunks(name), base.chunks(name), strict=True):
        numbers, others = _numbers(mine, kind, f"'{name}'"), _numbers(theirs, kind, f"the seed's '{name}'")
        moved += _squares(numbers - others)
        length += _squares(others)
        count += numbers.numel()
    return float((moved / (length or count or 1.0)) ** 0.5)


def _numbers(piece: memoryview, kind: str, what: str) -> Tensor:
    """Return a piece of a tensor in float32, or float64 where it is that; refuses what is not finite."""
    import torch

    stored = torch.frombuffer(bytearray(piece), dtype=torch.uint8).view(torch_dtype(kind))
    found = stored if stored.dtype == torch.float64 else stored.float()
    if not bool(torch.isfinite(found.abs().max() if found.numel() else torch.zeros(()))):
        raise _Refused(RefusalCode.NOT_FINITE, what)
    return found


def _squares(numbers: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(numbers, dtype=torch.float64).square())


def _check_beside(folder: Path, rules: Rules) -> None:
    """Hold the files beside the expert's tensors to what rows, biases and embeddings are like."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == SINGLE_FILE:
            continue
        stored = Checkpoint([path])
        for name in stored:
            what, squares, count = f"'{name:.100}' of {path.name:.100}", 0.0, 0
            for piece in stored.chunks(name):
                numbers = _numbers(piece, stored.entry(name).dtype, what)
                squares += _squares(numbers)
                count += numbers.numel()
            if (squares / max(count, 1)) ** 0.5 > rules.max_beside:
                raise _Refused(RefusalCode.NORM, what)
