"""SHA-256 digests of checkpoints, files and artefact folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from .safetensors_io import Checkpoint

MANIFEST_NAMES = {"seed": "seed.json", "expert": "expert.json", "generalist": "generalist.json"}
CARD_FILE = "README.md"
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


def digest_of_tensors(tensors: Mapping[str, str]) -> str:
    """Return a checkpoint's digest: the digest of its sorted (name, tensor digest) pairs, independent of sharding.

    Excludes the optimiser state that a seed keeps, which is not part of the model.
    """
    names = (name for name in sorted(tensors) if not name.startswith(f"{TRAINING_FOLDER}/"))
    return _digest_of_lines(f"{name} {tensors[name]}\n" for name in names)


def _digest_of_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return a file's sha256; for a safetensors file only its header's, since tensors have their own digests."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            prefix = file.read(8)
            length = min(int.from_bytes(prefix, "little"), path.stat().st_size)
            return hashlib.sha256(prefix + file.read(length)).hexdigest()
    return sha256_of_file(path)


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file's whole content, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_tokenizer(folder: Path) -> str:
    """Return the digest of a folder's tokenizer files."""
    names = (name for name in TOKENIZER_FILES if (folder / name).is_file())
    return _digest_of_lines(f"{name} {digest_of_file(folder / name)}\n" for name in names)


def digests_of_folder(folder: Path, known: Mapping[str, str] | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Return (tensor digests, file digests) of an artefact folder, without its manifest.

    Together they cover every byte: tensor digests the tensors, file digests the safetensors headers and all other
    files. `known` holds tensor digests computed at write time; those tensors are not read again.
    """
    known = known or {}
    tensors: dict[str, str] = {}
    files: dict[str, str] = {}
    for path in artefact_files(folder):
        files[path.relative_to(folder).as_posix()] = digest_of_file(path)
        if path.suffix == ".safetensors":
            prefix = tensor_prefix(folder, path)
            checkpoint = Checkpoint([path])
            computed = checkpoint.digests(name for name in checkpoint if prefix + name not in known)
            tensors.update({prefix + name: known.get(prefix + name) or computed[name] for name in checkpoint})
    return tensors, files


def tensor_prefix(folder: Path, file: Path) -> str:
    """Return the prefix of a file's tensor names in the manifest: '' at the top level, otherwise `sub/stem/`."""
    relative = file.relative_to(folder)
    return "" if len(relative.parts) == 1 else f"{relative.with_suffix('').as_posix()}/"


def artefact_files(folder: Path) -> Iterator[Path]:
    """Yield the files of an artefact in sorted order, without its manifest, hidden files and logs."""
    logs = {"metrics.jsonl", "training.log"}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in parts)
        is_manifest = len(parts) == 1 and path.name in MANIFEST_NAMES.values()
        if path.is_file() and not (is_hidden or is_manifest or path.name in logs):
            yield path
