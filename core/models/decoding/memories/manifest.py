"""The manifest of a memory: `memory.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Literal

from ....artefacts.digests import sha256_of_file
from ....artefacts.files import json_text, read_json, write_json
from ....artefacts.layout import MEMORY_MANIFEST
from ....errors import UserError
from ....manifests.manifest import CHECKSUM, Parent, read_manifest
from ....manifests.records import parse_record, record, record_as_json
from ....manifests.statements import DomainStatement
from ...loading import seed_of

FORMAT = 1
KEYS_FILE = "keys.bin"
VALUES_FILE = "values.bin"
INDEX_FILE = "index.faiss"

KeyKind = Literal["feed_forward_input", "final_hidden_state"]
IndexKind = Literal["exact", "ivf"]
Codes = Literal["float16", "int8", "pq"]


@record
class IndexRecord:
    """How the nearest keys are found. Distances are always those of the keys in `keys.bin`."""

    kind: IndexKind
    """`exact`: all keys are compared; `ivf`: those of the nearest lists."""
    codes: Codes = "float16"
    """How the index holds keys; `float16` with `exact` reads `keys.bin` and has no file of its own."""
    lists: int | None = None
    """Number of lists of `ivf`."""
    probes: int | None = None
    """Number of lists that a search reads."""
    code_bytes: int | None = None
    """Bytes of a key in the index."""


@record
class MemoryFit:
    """Interpolation that was fitted on the validation text of domains."""

    lambda_: float
    """Weight of the neighbours' distribution."""
    temperature: float
    """Temperature of the neighbours' squared distances."""
    k: int
    """Number of neighbours."""
    domains: tuple[str, ...]
    tokens: int
    """Number of predicted tokens."""
    bits_without: float
    """Bits per token of the model alone."""
    bits_with: float
    """Bits per token with the memory."""


@record
class MemoryManifest:
    """Content of `memory.json`. Unlike other artefacts, a memory holds text: the tokens of its domains."""

    kind: Literal["memory"]
    name: str
    model: Parent
    """The model that made the keys."""
    function: str
    """Digest of all that the model computes with: its tensors, for an expert also its seed's, and its `config.json`."""
    tokenizer: str
    """Digest of the tokenizer's files."""
    domains: Mapping[str, DomainStatement]
    """The text that keys were made of: the training part of domains."""
    domain_keys: Mapping[str, int]
    """Number of keys of each domain, in the order of the files."""
    keys: int
    """Number of keys."""
    width: int
    """Numbers of a key, in float16."""
    key: KeyKind
    """What a key is: the input of the last layer's feed-forward network, which a norm has made, or the final hidden state,
    for models whose last block has no norm before its feed-forward network."""
    window: int
    """Tokens of a window."""
    context: int
    """Least number of tokens before a key, but at the begin of a text."""
    index: IndexRecord
    fit: MemoryFit | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of every other file of the folder."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of expertctl and its main dependencies."""
    format: int = FORMAT
    """Version of the format."""

    @property
    def digest(self) -> str:
        """Digest of the sorted names and digests of all files."""
        lines = "".join(f"{name} {self.files[name]}\n" for name in sorted(self.files))
        return hashlib.sha256(lines.encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the manifest as the last file of a folder, since its presence means that the folder is complete."""
        content = record_as_json(self)
        ordered = {"format": content.pop("format"), **content, CHECKSUM: ""}
        ordered[CHECKSUM] = hashlib.sha256(json_text(ordered).encode("utf-8")).hexdigest()
        write_json(folder / MEMORY_MANIFEST, ordered)


def read_memory(folder: Path) -> MemoryManifest:
    """Read a memory's manifest; raises `UserError` if there is none, it has another format, or it is damaged."""
    path = folder / MEMORY_MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is not a finished memory: it has no {MEMORY_MANIFEST}")
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {content.get('format')}; this version reads format {FORMAT}: build the memory again"
        )
    content.pop(CHECKSUM, None)
    return parse_record(MemoryManifest, content, str(path))


def verify_memory(folder: Path) -> list[str]:
    """Return the differences between a memory's files and its manifest, every byte compared; empty if there are none."""
    manifest = read_memory(folder)
    differences = []
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MEMORY_MANIFEST}
    for name in sorted(names | manifest.files.keys()):
        if name not in names:
            differences.append(f"file {name} is missing")
        elif name not in manifest.files:
            differences.append(f"file {name} was added")
        elif sha256_of_file(folder / name) != manifest.files[name]:
            differences.append(f"file {name} was changed")
    content = read_json(folder / MEMORY_MANIFEST)
    checksum = content.get(CHECKSUM)
    if hashlib.sha256(json_text({**content, CHECKSUM: ""}).encode("utf-8")).hexdigest() != checksum:
        differences.append(f"{MEMORY_MANIFEST} itself was changed")
    return differences


def require_memory_of(memory: Path, model: Path) -> MemoryManifest:
    """Return the manifest of an intact memory whose keys the model in a folder made.

    Raises `UserError` for missing or changed files, and for a memory of another model.
    """
    manifest = read_memory(memory)
    if manifest.function != function_digest(model):
        raise UserError(
            f"memory '{manifest.name}' was made with {manifest.model.kind} '{manifest.model.name}' "
            f"({manifest.model.digest[:12]}), and {model.name} computes other keys; build one with `expertctl memory build "
            f"NAME --domains {','.join(manifest.domains)} --model {model.name}`"
        )
    if problems := verify_memory(memory):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{memory} is not what its manifest says: {problems[0]}{more}; build the memory again")
    return manifest


def function_digest(folder: Path) -> str:
    """Return the digest of all that a model computes with; raises `UserError` for a folder without a manifest."""
    manifest = read_manifest(folder)
    digests = [manifest.digest]
    config = manifest.files.get("config.json", "")
    if manifest.kind == "expert":
        seed = read_manifest(seed_of(folder, manifest))
        digests.append(seed.digest)
        config = seed.files.get("config.json", "")
    return hashlib.sha256("".join(f"{digest}\n" for digest in (*digests, config)).encode()).hexdigest()
