"""Acceptance checks of deliveries: every check that needs none of the owner's text.

Tensors are compared with the seed's piece by piece, so that memory does not grow with the size of the expert. Invalid content of
any kind leads to a refusal, never to an exception.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from ....core.artefacts.digests import MANIFEST_NAMES
from ....core.artefacts.files import read_json
from ....core.artefacts.safetensors_io import SINGLE_FILE, Checkpoint, TensorEntry, torch_dtype
from ....core.errors import UserError, first_line
from ....core.manifests.manifest import Manifest, read_manifest
from ....core.manifests.verification import verify
from ...runs.trainable import changeable_tensors
from ..protocol.delivery import SignedStatement
from ..protocol.keys import PublicKey
from ..protocol.requests import ExpertRequest

if TYPE_CHECKING:
    from torch import Tensor

MAX_EXTRA_FILES = 4
"""Maximum number of tensor files beside the model's, such as a router row or a domain embedding."""
MAX_CHANGE = 3.0
"""Largest change of a tensor: norm of the difference divided by the norm of the seed's tensor. Training changes tensors by less
than 1; weights scaled up by four or more exceed the bound."""
MAX_EXTRA_RMS = 100.0
"""Largest root mean square of a tensor in an extra file."""
SIZE_SLACK = 64 << 20
"""Bytes by which an expert may exceed the seed."""
MAX_LOSS_RATIO = 2.0
"""Largest loss on public text, as a multiple of the seed's."""


class RefusalCode(Enum):
    """Reasons for a refusal; the code crosses the network, each side has its own sentence."""

    SIGNATURE = "the statement is not signed by the owner's key"
    SOMEONE_ELSES = "the statement names another request, owner, seed or recipe"
    REPLAY = "the same expert was accepted before"
    LATE = "the deadline has passed"
    FILES = "files are missing or unexpected"
    TOO_LARGE = "the delivery is larger than an expert of this seed can be"
    DIGEST = "the files do not match the manifest"
    MANIFEST = "the manifest does not match the request"
    SHAPES = "a tensor's name or shape differs from the seed's"
    DTYPES = "a tensor's dtype differs from the seed's"
    FROZEN = "a frozen tensor has changed"
    NOT_FINITE = "a tensor has values that are not finite"
    NORM = "a tensor differs from the seed's by more than training explains"
    PRIVACY = "the privacy budget spent exceeds the requested one"
    HELD_OUT = "the loss on public text is too high"


@dataclass(frozen=True)
class Refusal:
    """The refusal of one delivery."""

    code: RefusalCode
    detail: str = ""
    """Details for the coordinator; not sent to the owner."""

    def __str__(self) -> str:
        return f"{self.code.value}{f' ({self.detail})' if self.detail else ''}"


@dataclass(frozen=True)
class HeldOut:
    """Losses of seed and expert on the coordinator's public text, in the same unit."""

    seed: float
    expert: float


Measure = Callable[[Path, Path], HeldOut | None]
"""Scores the folders of a seed and an expert; None without public text."""


class _Refused(Exception):
    def __init__(self, code: RefusalCode, detail: str = "") -> None:
        super().__init__(code.name)
        self.refusal = Refusal(code, detail)


def refusal_of_statement(signed: SignedStatement, request: ExpertRequest, key: PublicKey) -> Refusal | None:
    """Judge a statement before any file is sent; return the refusal or None."""
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
    if len(tensors) > 1 + MAX_EXTRA_FILES:
        return Refusal(RefusalCode.FILES, f"{len(tensors)} tensor files")
    total = sum(file.size for file in statement.files)
    seed_bytes = sum(file.size for file in request.seed_files)
    if total > seed_bytes + SIZE_SLACK:
        return Refusal(RefusalCode.TOO_LARGE, f"{total:,} bytes; the seed has {seed_bytes:,}")
    return None


def refusal_of_expert(
    folder: Path,
    signed: SignedStatement,
    request: ExpertRequest,
    seed: Path,
    held_out: Callable[[], HeldOut | None],
) -> Refusal | None:
    """Judge an expert with all its files; return the refusal or None. `held_out` is called after all other checks pass."""
    try:
        manifest = _checked_manifest(folder, signed, request)
        _check_privacy(manifest, request)
        _check_tensors(folder, manifest, seed)
        _check_extra_files(folder)
        losses = held_out()
    except _Refused as refused:
        return refused.refusal
    if losses is not None and not losses.expert <= MAX_LOSS_RATIO * losses.seed:  # true for NaN as well
        loss = "the expert cannot be scored" if math.isnan(losses.expert) else f"{losses.expert:.3f}"
        return Refusal(RefusalCode.HELD_OUT, f"{loss}; the seed has {losses.seed:.3f}")
    return None


def _checked_manifest(folder: Path, signed: SignedStatement, request: ExpertRequest) -> Manifest:
    try:
        problems = verify(folder)
        manifest = read_manifest(folder)
        run = read_json(folder / "run.json")
    except (UserError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise _Refused(RefusalCode.DIGEST, first_line(error).replace(str(folder), "the delivery")) from None
    if problems:
        raise _Refused(RefusalCode.DIGEST, problems[0])
    seeds = [parent.digest for parent in manifest.parents if parent.kind == "seed"]
    entries = {
        "kind": (manifest.kind, "expert"),
        "owner": (manifest.owner, request.owner),
        "seed": (seeds, [request.seed]),
        "trainer": (manifest.trainable, request.recipe.trains),
        "digest": (manifest.digest, signed.statement.expert),
        "run": (run.get("trains"), request.recipe.trains),
    }
    for name, (value, expected) in entries.items():
        if value != expected:
            raise _Refused(RefusalCode.MANIFEST, f"{name} is {value!r:.100}")
    return manifest


def _check_privacy(manifest: Manifest, request: ExpertRequest) -> None:
    requested = request.recipe.privacy
    if requested is None:
        return
    spent = manifest.data.privacy
    is_private_enough = (
        spent is not None
        and spent.epsilon is not None
        and spent.epsilon <= float(requested["epsilon"])
        and spent.delta <= float(requested["delta"])
    )
    if not is_private_enough:
        raise _Refused(RefusalCode.PRIVACY)


def _check_tensors(folder: Path, manifest: Manifest, seed: Path) -> None:
    """Compare every tensor with the seed's tensor of the same name."""
    expert, base = Checkpoint([folder / SINGLE_FILE]), Checkpoint.of_folder(seed)
    model_type = str(read_json(seed / "config.json").get("model_type"))
    trainable = changeable_tensors(str(manifest.trainable), base, model_type)
    seed_digests = read_manifest(seed).tensors
    if not list(expert):
        raise _Refused(RefusalCode.FILES, "there is no tensor")
    for name in expert:
        if name not in base:
            raise _Refused(RefusalCode.SHAPES, f"the seed has no tensor '{name:.100}'")
        refusal = refusal_of_entry(expert.entry(name), base.entry(name), "the seed's")
        if refusal is not None:
            raise _Refused(refusal.code, refusal.detail)
        if name not in trainable and expert.digest(name) != seed_digests.get(name):
            raise _Refused(RefusalCode.FROZEN, f"'{name}'")
        change = relative_change(expert, base, name)
        if not change <= MAX_CHANGE:
            raise _Refused(RefusalCode.NORM, f"'{name}' by {change:.3g} times its norm; {MAX_CHANGE:g} is allowed")


def refusal_of_entry(entry: TensorEntry, expected: TensorEntry, label: str) -> Refusal | None:
    """Refuse a tensor of another shape or dtype than the expected one, which the refusal calls `label`."""
    if entry.shape != expected.shape:
        return Refusal(RefusalCode.SHAPES, f"'{entry.name}' is {list(entry.shape)}, {label} {list(expected.shape)}")
    if entry.dtype != expected.dtype:
        return Refusal(RefusalCode.DTYPES, f"'{entry.name}' is {entry.dtype}, {label} {expected.dtype}")
    return None


def relative_change(expert: Checkpoint, base: Checkpoint, name: str) -> float:
    """Return the norm of a tensor's difference from the seed's, divided by the norm of the seed's tensor.

    A zero-norm seed tensor is treated as all ones. Both are read in pieces.
    """
    squared_change = squared_norm = count = 0.0
    pieces = zip(_values(expert, name, f"'{name}'"), _values(base, name, f"the seed's '{name}'"), strict=True)
    for values, base_values in pieces:
        squared_change += _squared_norm(values - base_values)
        squared_norm += _squared_norm(base_values)
        count += values.numel()
    return float((squared_change / (squared_norm or count or 1.0)) ** 0.5)


def _values(checkpoint: Checkpoint, name: str, label: str) -> Iterator[Tensor]:
    """Yield the pieces of a tensor as float32, or float64 if stored as such; refuses values that are not finite."""
    import torch

    dtype = torch_dtype(checkpoint.entry(name).dtype)
    for chunk in checkpoint.chunks(name):
        values = upcast(torch.frombuffer(bytearray(chunk), dtype=torch.uint8).view(dtype))
        if not bool(torch.isfinite(values.abs().max() if values.numel() else torch.zeros(()))):
            raise _Refused(RefusalCode.NOT_FINITE, label)
        yield values


def upcast(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype used for comparing and averaging: float64 stays, other dtypes become float32."""
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _squared_norm(values: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())


def _check_extra_files(folder: Path) -> None:
    """Bound the root mean square of tensors in extra files, such as router rows, biases and embeddings."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == SINGLE_FILE:
            continue
        stored = Checkpoint([path])
        for name in stored:
            label, squares, count = f"'{name:.100}' of {path.name:.100}", 0.0, 0
            for values in _values(stored, name, label):
                squares += _squared_norm(values)
                count += values.numel()
            if (squares / max(count, 1)) ** 0.5 > MAX_EXTRA_RMS:
                raise _Refused(RefusalCode.NORM, label)
