"""Deliveries: the expert that leaves an owner, and the statement that the owner signs.

The outgoing manifest holds counts of the owner's text to two significant digits. It holds no text, path, host or user name, and
no digest of text, since a digest confirms a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, FailFast, Field

from ....core.artefacts.digests import MANIFEST_NAMES
from ....core.artefacts.files import link_or_copy, new_folder, read_json, write_json
from ....core.errors import UserError
from ....core.manifests.manifest import Manifest, read_manifest
from ....core.manifests.statements import DataStatement, DomainStatement, PrivacyStatement
from ...text.corpora import two_digits
from .fields import Digest, Identifier, Message, Name, Signature
from .keys import OwnerKey
from .parts import PART_BYTES, FileParts, parts_of
from .requests import ExpertRequest, canonical_json, require_distinct

DELIVERY_FILE = "delivery.json"
MAX_STATEMENT = 1 << 20
"""Largest `delivery.json`, in bytes."""
MAX_HEADER = 8 << 20
"""Largest header of a safetensors file, in bytes; it is read into memory whole."""
MAX_TEXT = 300
"""Longest text in a delivered manifest, in letters; all have to be printable."""
MAX_VALUES = 1000
"""Most values in a statement's account of text and privacy."""
MAX_FILES = 8
"""Most files of a delivery: the expert's tensors, its manifest and run, and files of its trainer."""


def _count_values(content: Any) -> int:
    """Return the number of values in JSON content, those of lists and objects included."""
    count, waiting = 0, [content]
    while waiting:
        value = waiting.pop()
        count += 1
        waiting += value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return count


@dataclass(frozen=True)
class Statement(Message):
    """An owner's description of a delivered expert, which the owner signs."""

    LABEL = "the statement of a delivery"
    FORMAT = 1

    request: Identifier
    owner: Name
    seed: Digest
    recipe: Digest
    expert: Digest
    """Digest of the expert's tensors."""
    files: Annotated[
        tuple[Annotated[FileParts, BeforeValidator(FileParts.of_json)], ...],
        Field(min_length=1, max_length=MAX_FILES),
        FailFast(),
    ]
    data: DataStatement
    """Counts of documents, tokens and bytes, to two significant digits."""
    privacy: PrivacyStatement | None
    """Privacy budget spent; None without differential privacy."""

    def __post_init__(self) -> None:
        require_distinct(self.files, "the delivery")

    @classmethod
    def of_json(cls, content: Any) -> Self:
        """Read the result of `as_json`; raises `UserError` for anything else, and for an account of many thousand values."""
        if isinstance(content, dict) and _count_values([content.get("data"), content.get("privacy")]) > MAX_VALUES:
            raise UserError(f"{cls.LABEL} has more than {MAX_VALUES} values about text and privacy; it is refused")
        return super().of_json(content)

    @property
    def signed_bytes(self) -> bytes:
        """Return the bytes that the signature covers."""
        return canonical_json(self.as_json())


@dataclass(frozen=True)
class SignedStatement(Message):
    """A statement and its signature."""

    LABEL = "the delivery"

    statement: Annotated[Statement, BeforeValidator(Statement.of_json)]
    signature: Signature

    def as_json(self) -> dict[str, Any]:
        return {"statement": self.statement.as_json(), "signature": self.signature}

    @classmethod
    def read(cls, folder: Path) -> SignedStatement:
        """Read the statement in a delivery's folder; raises `UserError` if there is none."""
        path = folder / DELIVERY_FILE
        if not path.is_file() or path.is_symlink() or path.stat().st_size > MAX_STATEMENT:
            raise UserError(
                f"{folder} is not a delivery: {DELIVERY_FILE} is missing or larger than {MAX_STATEMENT:,} bytes"
            )
        return cls.of_json(read_json(path))


def make_delivery(
    expert: Path, request: ExpertRequest, key: OwnerKey, folder: Path, *, part_size: int = PART_BYTES
) -> SignedStatement:
    """Write the files that leave the owner into `folder` and sign them; the expert itself stays unchanged."""
    manifest = outgoing_manifest(read_manifest(expert), request)
    with new_folder(folder, force=True, what="delivery") as partial:
        for name in manifest.files:
            link_or_copy(expert / name, partial / name)
        manifest.write(partial)
        names = sorted([*manifest.files, MANIFEST_NAMES["expert"]])
        statement = Statement(
            request=request.id,
            owner=request.owner,
            seed=request.seed,
            recipe=request.recipe.digest,
            expert=manifest.digest,
            files=tuple(parts_of(partial / name, part_size) for name in names),
            data=manifest.data,
            privacy=manifest.data.privacy,
        )
        signed = SignedStatement(statement, key.sign(statement.signed_bytes))
        write_json(partial / DELIVERY_FILE, signed.as_json())
    return signed


def outgoing_manifest(manifest: Manifest, request: ExpertRequest) -> Manifest:
    """Return the manifest that leaves: counts to two significant digits, losses to three decimals, no digest of text."""
    domains = manifest.domains.values()
    licences = {domain.licence for domain in domains}
    statement = DomainStatement(
        two_digits(sum(domain.documents for domain in domains)),
        two_digits(sum(domain.tokens for domain in domains)),
        two_digits(sum(domain.bytes for domain in domains)),
        licence=licences.pop() if len(licences) == 1 else None,
        rounded=True,
    )
    return replace(
        manifest,
        owner=request.owner,
        data=replace(manifest.data, domains={request.owner: statement}),
        metrics=_rounded_metrics(manifest.metrics, request.owner),
    )


def _rounded_metrics(metrics: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return the metrics with losses to three decimals; losses by domain become one under the owner's name."""
    rounded: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, float):
            rounded[name] = round(value, 3)
        elif name == "validation_loss" and isinstance(value, Mapping):
            rounded[name] = {owner: round(sum(value.values()) / len(value), 3)} if value else {}
    return rounded
