"""The index of a remote folder: `.files.json` with the size and sha256 of every file.

It is the last file but the manifest that `push` writes, and says itself whether the folder is complete. It is hidden, so that
the folder with it is still the artefact that its manifest describes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ..artefacts.files import inside, json_text
from ..errors import UserError
from .urls import MissingFile

if TYPE_CHECKING:
    from .urls import Remote

INDEX_FILE = ".files.json"
MAX_INDEX_BYTES = 64 << 20
MAX_FILES = 100_000
MAX_FILE_BYTES = 1 << 50
_REMEDY = "push the artefact again with --force"


class DamagedIndexError(UserError):
    """An index that `push` did not write."""


@dataclass(frozen=True)
class RemoteFile:
    """Size and version of a file at a remote."""

    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    """Bytes."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """None for a remote without an index."""
    version: str | None = None
    """Digest of what the remote says about the file, to notice a change; None if there is a sha256."""


@dataclass(frozen=True)
class Index:
    """The files of a remote folder that `push` wrote."""

    files: Annotated[Mapping[str, RemoteFile], Field(max_length=MAX_FILES)]
    complete: bool
    """Whether the last push came to its end."""
    format: Literal[1] = 1

    def text(self) -> str:
        """Return the content of `.files.json`."""
        files = {name: {"size": file.size, "sha256": file.sha256} for name, file in sorted(self.files.items())}
        return json_text({"format": self.format, "complete": self.complete, "files": files})


def read_index(remote: Remote) -> Index | None:
    """Return the index of a remote folder, None if it has none; raises `UserError` if it is damaged or hostile."""
    try:
        content = remote.read_whole(INDEX_FILE, MAX_INDEX_BYTES)
    except MissingFile:
        return None
    return parse_index(content, f"{remote.url}/{INDEX_FILE}")


def parse_index(content: bytes, where: str) -> Index:
    """Parse `.files.json`; raises `UserError` for damage, and for names that leave the folder or are hidden."""
    try:
        index: Index = TypeAdapter(Index).validate_python(json.loads(content))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise DamagedIndexError(f"{where} is damaged ({place!a:.120}: {problem['msg']}); {_REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedIndexError(f"{where} is damaged ({error!s:.120}); {_REMEDY}") from None
    for name, file in index.files.items():
        local_path(Path(), name)
        if file.sha256 is None:
            raise DamagedIndexError(f"{where} is damaged ({name!a:.80} has no sha256); {_REMEDY}")
    return index


def local_path(folder: Path, name: str) -> Path:
    """Return the path of a remote's file in a local folder; raises `UserError` for a name that leaves it or is hidden."""
    parts = name.split("/")
    if any(part.startswith(".") for part in parts):
        raise UserError(f"{name!a:.80} is not the name of a visible file; it is refused")
    return inside(folder, *parts)
