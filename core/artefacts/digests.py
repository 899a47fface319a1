"""SHA-256 digests of checkpoints, files and artefact folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from .safetensors_io import Checkpoint

MANIFEST_NAMES = {"seed": "seed.json", "expert": "expert.json", "generalist": "generalist.json"}
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
    state = hashlib.sha256()
    for name in sorted(tensors):
        if not name.startswith(f"{TRAINING_FOLDER}/"):
            state.update(f"{name} {tensors[name]}\n".encode())
    return state.hexdigest()


def digest_of_file(path: Path) -> str:
    """Return a file's sha256; for a safetensors file only its header's, since tensors have their own digests."""
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


def digests_of_folder(folder: Path, known: Mapping[str, str] | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Return (tensor digests, file digests) of an artefact folder, without its manifest.

    Together they cover every byte: tensor digests the tensors, file digests the safetensors headers and all other
    files. `known` holds tensor digests computed at write time; those tensors are not read again.
    """
    known = known or {}
    tensors: dict[str, str] = {}
    files: dict[str, str] = {}
    for path in artefact_files(folder):
        relative = path.relative_to(folder).as_posix()
        files[relative] = digest_of_file(path)
        if path.suffix == ".safetensors":
            prefix = tensor_prefix(folder, path)
            checkpoint = Checkpoint([path])
            missing = [name for name in checkpoint if prefix + name not in known]
            computed = checkpoint.digests(missing)
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
        relative = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not is_hidden and path.name not in logs:
            if len(relative.parts) == 1 and path.name in MANIFEST_NAMES.values():
                continue
            yield path
