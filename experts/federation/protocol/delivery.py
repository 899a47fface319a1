"""What leaves an owner: an expert as an artefact of its own, and a statement that the owner signed.

Its manifest says how much text there was to two digits, and never which: no digest that a guess could be checked against,
no text, path, host or user.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....core.artefacts.files import link_or_copy, new_folder, read_json, write_json
from ....core.artefacts.lineage import MANIFEST_NAMES, Manifest, read_manifest
from ....core.errors import UserError
from .keys import OwnerKey
from .parts import PART_BYTES, FileParts, parts_of
from .requests import ExpertRequest, canonical

FORMAT = 1
DELIVERY_FILE = "delivery.json"
DIGITS = 2
"""Of counts that are told."""
MAX_STATEMENT = 4 << 20


@dataclass(frozen=True)
class Statement:
    """What an owner says of an expert, and signs."""

    request: str
    owner: str
    seed: str
    recipe: str
    """Digest of the recipe."""
    expert: str
    """Digest of its tensors."""
    files: tuple[FileParts, ...]
    data: Mapping[str, Any]
    """Counts of documents, tokens and bytes, to two digits."""
    privacy: Mapping[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "request": self.request,
            "owner": self.owner,
            "seed": self.seed,
            "recipe": self.recipe,
            "expert": self.expert,
            "files": [file.as_json() for file in self.files],
            "data": dict(self.data),
            "privacy": dict(self.privacy) if self.privacy is not None else None,
        }

    @property
    def signed_bytes(self) -> bytes:
        """What the signature is over."""
        return canonical(self.as_json())

    @classmethod
    def of_json(cls, content: Any) -> Statement:
        """Read what `as_json` gives; raises `UserError` for anything else, since it comes from outside."""
        names = {"format", "request", "owner", "seed", "recipe", "expert", "files", "data", "privacy"}
        if not isinstance(content, dict) or set(content) != names or content["format"] != FORMAT:
            raise UserError(
                "that is no statement of this version; let coordinator and owner use the same version"
            )
        words = [content[name] for name in ("request", "owner", "seed", "recipe", "expert")]
        if (
            not all(isinstance(word, str) and len(word) < 200 for word in words)
            or not isinstance(content["files"], list)
            or not isinstance(content["data"], dict)
            or not (content["privacy"] is None or isinstance(content["privacy"], dict))
        ):
            raise UserError("the statement makes no sense")
        files = tuple(FileParts.of_json(file) for file in content["files"])
        if len({file.name for file in files}) != len(files):
            raise UserError("the statement names a file twice")
        request, owner, seed, recipe, expert = words
        return cls(request, owner, seed, recipe, expert, files, content["data"], content["privacy"])


@dataclass(frozen=True)
class Signed:
    """A statement with its signature."""

    statement: Statement
    signature: str

    def as_json(self) -> dict[str, Any]:
        return {"statement": self.statement.as_json(), "signature": self.signature}

    @classmethod
    def of_json(cls, content: Any) -> Signed:
        if not isinstance(content, dict) or not isinstance(content.get("signature"), str):
            raise UserError("that is no signed statement")
        return cls(Statement.of_json(content.get("statement")), content["signature"])

    @classmethod
    def read(cls, folder: Path) -> Signed:
        """Read a delivery's statement; raises `UserError` where there is none."""
        path = folder / DELIVERY_FILE
        if not path.is_file() or path.stat().st_size > MAX_STATEMENT:
            raise UserError(f"{folder} is no delivery: it has no {DELIVERY_FILE} of sensible size")
        return cls.of_json(read_json(path))


def make_delivery(
    expert: Path, request: ExpertRequest, key: OwnerKey, folder: Path, *, part_size: int = PART_BYTES
) -> Signed:
    """Write what leaves the owner into `folder` and sign it; the expert itself stays as it is."""
    manifest = outgoing(read_manifest(expert), request)
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
            privacy=manifest.data.get("privacy"),
        )
        signed = Signed(statement, key.sign(statement.signed_bytes))
        write_json(partial / DELIVERY_FILE, signed.as_json())
    return signed


def outgoing(manifest: Manifest, request: ExpertRequest) -> Manifest:
    """Return an expert's manifest as it may leave: counts to two digits, no digest of text, losses to three places."""
    counts = {"documents": 0, "tokens": 0, "bytes": 0}
    for about in manifest.data.get("domains", {}).values():
        for name in counts:
            counts[name] += int(about.get(name, 0))
    licences = {about.get("licence") for about in manifest.data.get("domains", {}).values()}
    told = {
        **{name: rounded(count) for name, count in counts.items()},
        "licence": licences.pop() if len(licences) == 1 else None,
    }
    return replace(
        manifest,
        owner=request.owner,
        data={
            "domains": {request.owner: told},
            **{name: manifest.data[name] for name in ("trained_tokens", "privacy") if name in manifest.data},
        },
        metrics=_shortened(manifest.metrics, request.owner),
    )


def _shortened(metrics: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return metrics with losses to three places; those by domain stand under the owner's name."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, float):
            found[name] = round(value, 3)
        elif name == "validation_loss" and isinstance(value, Mapping):
            found[name] = {owner: round(sum(value.values()) / len(value), 3)} if value else {}
    return found


def rounded(count: int, digits: int = DIGITS) -> int:
    """Return a count to its first two digits: 12,345 -> 12,000."""
    if count == 0:
        return 0
    return int(round(count, digits - 1 - math.floor(math.log10(abs(count)))))
