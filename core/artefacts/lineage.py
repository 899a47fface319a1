"""Manifests: where an artefact comes from, and the digests that prove that it still is what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import json_text, read_json, write_json
from .safetensors_io import Checkpoint

FORMAT = 1
MANIFEST_NAMES = {"seed": "seed.json", "expert": "expert.json", "generalist": "generalist.json"}
CHECKSUM = "checksum"
"""Key of a manifest's own sha256: over its text with this value left empty."""
TRAINING_FOLDER = "training"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)


@dataclass(frozen=True)
class Parent:
    """One artefact that another was made from."""

    kind: str
    name: str
    digest: str
    weight: float | None = None
    """Its share, where the making had weights."""
    owner: str | None = None
    licence: str | None = None

    @classmethod
    def of(cls, manifest: Manifest, name: str, weight: float | None = None) -> Parent:
        """Return an artefact as the parent of another, which may know it by another name."""
        return cls(manifest.kind, name, manifest.digest, weight, manifest.owner, manifest.licence)


@dataclass(frozen=True)
class Manifest:
    """What `seed.json`, `expert.json` and `generalist.json` hold. Never a text, a time or a path."""

    kind: str
    name: str
    digest: str
    """Digest of the sorted (tensor name, tensor digest) list."""
    tensors: Mapping[str, str]
    """Digest of every tensor in the folder, by name (with its file's stem where names repeat)."""
    files: Mapping[str, str]
    """sha256 of every other file, and of the header of every safetensors file, by path in the folder."""
    tokenizer: str
    """Digest of the tokenizer's files."""
    parents: tuple[Parent, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration that made it, random seeds included."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Data statement: domains with documents, tokens, bytes and digests."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    trainable: str | None = None
    owner: str | None = None
    licence: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write the manifest; the last file of a folder, since its presence means complete."""
        content = asdict(self)
        ordered = {"format": content.pop("format"), **content, CHECKSUM: ""}
        ordered[CHECKSUM] = _sha256(json_text(ordered))
        write_json(folder / MANIFEST_NAMES[self.kind], ordered)


def manifest_path(folder: Path) -> Path | None:
    """Return the manifest of an artefact folder, or None if it is none."""
    return next((folder / name for name in MANIFEST_NAMES.values() if (folder / name).is_file()), None)


def read_manifest(folder: Path) -> Manifest:
    """Read an artefact's manifest; raises `UserError` when there is none or it is of another format."""
    path = manifest_path(folder)
    if path is None:
        raise UserError(
            f"{folder} is no finished artefact: it has none of {', '.join(MANIFEST_NAMES.values())}"
        )
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has format {content.get('format')}; this version reads format {FORMAT}")
    content.pop(CHECKSUM, None)
    try:
        parents = tuple(Parent(**parent) for parent in content.pop("parents", ()))
        return Manifest(parents=parents, **content)
    except TypeError as error:
        raise UserError(f"{path} is damaged ({error}); make the folder again") from None


def digest_of_tensors(tensors: Mapping[str, str]) -> str:
    """Return a checkpoint's digest: that of its sorted (name, tensor digest) list, whatever the sharding.

    The optimiser state that a seed keeps is no part of the model and does not count.
    """
    state = hashlib.sha256()
    for name in sorted(tensors):
        if not name.startswith(f"{TRAINING_FOLDER}/"):
            state.update(f"{name} {tensors[name]}\n".encode())
    return state.hexdigest()


def digest_of_file(path: Path) -> str:
    """Return a file's sha256; of a safetensors file only the header counts, its tensors have their own."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            prefix = file.read(8)
            length = min(int.from_bytes(prefix, "little"), path.stat().st_size)
            return hashlib.sha256(prefix + file.read(length)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_tokenizer(folder: Path) -> str:
    """Return the digest of a folder's tokenizer files."""
    state = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            state.update(f"{name} {digest_of_file(folder / name)}\n".encode())
    return state.hexdigest()


def digests_of_folder(
    folder: Path, known: Mapping[str, str] | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return (tensor digests, file digests) of everything in an artefact folder but its manifest.

    Together they cover every byte: tensors theirs, file digests the headers and all other files. `known` holds
    digests of tensors that were computed while they were written; those are not read again.
    """
    given = known or {}
    tensors: dict[str, str] = {}
    files: dict[str, str] = {}
    for path in _content(folder):
        relative = path.relative_to(folder).as_posix()
        files[relative] = digest_of_file(path)
        if path.suffix == ".safetensors":
            prefix = tensor_prefix(folder, path)
            checkpoint = Checkpoint([path])
            missing = [name for name in checkpoint if prefix + name not in given]
            found = checkpoint.digests(missing)
            tensors.update({prefix + name: given.get(prefix + name) or found[name] for name in checkpoint})
    return tensors, files


def tensor_prefix(folder: Path, file: Path) -> str:
    """Return what sets a file's tensor names apart in its manifest: '' at the top, else `sub/stem/`."""
    relative = file.relative_to(folder)
    return "" if len(relative.parts) == 1 else f"{relative.with_suffix('').as_posix()}/"


def _content(folder: Path) -> Iterable[Path]:
    """Yield the files that belong to an artefact: not its manifest, hidden files, logs or training state."""
    passing = {"metrics.jsonl", "training.log"}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and path.name not in passing:
            if len(relative.parts) == 1 and path.name in MANIFEST_NAMES.values():
                continue
            yield path


def verify(folder: str | Path, *, tensors: bool = True) -> list[str]:
    """Check every byte of an artefact and return what differs, a line each; empty when all is as written.

    Without `tensors` their bytes are left to whoever reads them: headers and all other files are checked.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    found: list[str] = []
    files = {path.relative_to(folder).as_posix(): path for path in _content(folder)}
    for name in sorted(manifest.files.keys() | files.keys()):
        if name not in files:
            found.append(f"file {name} is missing")
        elif name not in manifest.files:
            found.append(f"file {name} was added")
        elif digest_of_file(files[name]) != manifest.files[name]:
            found.append(f"file {name} was changed")
    if tensors:
        found += _verify_tensors(folder, manifest, files)
    if digest_of_tensors(manifest.tensors) != manifest.digest:
        found.append("the manifest's own list of tensors does not match its digest")
    path = manifest_path(folder)
    if path is not None and not _is_as_written(path):
        found.append(f"{path.name} itself was changed")
    return found


def _is_as_written(manifest: Path) -> bool:
    """Tell whether a manifest's text has the checksum that it holds."""
    checksum = read_json(manifest).get(CHECKSUM)
    text = manifest.read_bytes().decode("utf-8")
    return _sha256(text.replace(f'"{CHECKSUM}": "{checksum}"', f'"{CHECKSUM}": ""')) == checksum


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _verify_tensors(folder: Path, manifest: Manifest, files: Mapping[str, Path]) -> list[str]:
    found: list[str] = []
    seen: set[str] = set()
    for path in files.values():
        if path.suffix != ".safetensors":
            continue
        prefix = tensor_prefix(folder, path)
        try:
            digests = Checkpoint([path]).digests()
        except UserError as error:
            found.append(str(error))
            continue
        seen |= {prefix + name for name in digests}
        found += [
            f"tensor {prefix}{name} was changed"
            for name, digest in digests.items()
            if manifest.tensors.get(prefix + name) != digest
        ]
    return found + [f"tensor {name} is missing" for name in sorted(manifest.tensors.keys() - seen)]


def require_intact(folder: Path, *, tensors: bool = True) -> Manifest:
    """Return the manifest of an artefact that was checked (see `verify`); raises `UserError` naming what changed."""
    problems = verify(folder, tensors=tensors)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{folder} is not what its manifest says: {problems[0]}{more}; restore or remake it")
    return read_manifest(folder)


def tool_versions() -> dict[str, str]:
    """Return the versions that can change the bytes of a result."""
    return {
        name: package_version(name)
        for name in ("expertctl", "torch", "transformers", "tokenizers", "safetensors")
    }


def package_version(name: str) -> str:
    """Return the version of an installed distribution."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
