"""The manifest of an artefact: what it is, where it comes from, and the digests of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal

from ..artefacts.digests import MANIFEST_NAMES
from ..artefacts.files import json_text, read_json, write_json
from ..errors import UserError
from .generalist import ExpertChange, GeneralistConfig, Tuning
from .records import parse_record, record, record_as_json
from .run import RunSpec
from .statements import DataStatement, DomainStatement

FORMAT = 2
CHECKSUM = "checksum"
"""Key of a manifest's own sha256: over its text with this value left empty."""


@record
class Parent:
    """One artefact that another was made from."""

    kind: str
    """`seed`, `expert`, `generalist`, `adapter` or `model`."""
    name: str
    digest: str
    """Digest of the parent when the artefact was made."""
    weight: float | None = None
    """Weight of the parent in a merge, or in the starting point of a run."""
    owner: str | None = None
    """Owner of the parent's training data."""
    licence: str | None = None

    @classmethod
    def of(cls, manifest: Manifest, name: str, weight: float | None = None) -> Parent:
        """Return an artefact as a parent, under the name by which the child knows it."""
        return cls(manifest.kind, name, manifest.digest, weight, manifest.owner, manifest.licence)


@record
class ImportedSeed:
    """The configuration of a seed that was imported, not pretrained here."""

    model_type: str | None = None
    """`model_type` in the model's `config.json`."""
    documents_begin_with: tuple[str, ...] = ()
    """Tokens that the tokenizer puts before a text, and so before every document; a separator stands there in any case."""
    rope_base: float | None = None
    """RoPE base in place of the model's own; None: its own."""
    positions: int | None = None
    """Number of positions in place of the model's own; None: its own."""


@record
class Manifest:
    """Content of `seed.json`, `expert.json` and `generalist.json`. It never contains training text, times or paths."""

    kind: Literal["seed", "expert", "generalist"]
    name: str
    """Name of the artefact in its workspace."""
    digest: str = ""
    """Digest of the model: of the sorted list of (tensor name, tensor digest)."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Digest of every tensor in the folder, by name. A name that occurs in several files is prefixed with the file's
    stem."""
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of every other file, and of the header of every safetensors file, by path within the folder."""
    tokenizer: str = ""
    """Digest of the tokenizer's files."""
    parents: tuple[Parent, ...] = ()
    """Models that the artefact was made from; empty for a seed."""
    config: RunSpec | ImportedSeed | GeneralistConfig | None = None
    """Resolved configuration of the run, the import or the merge, including random seeds."""
    data: DataStatement = field(default_factory=DataStatement)
    """The text that this artefact itself was trained on."""
    expert_data: Mapping[str, DataStatement] = field(default_factory=dict)
    """Generalists: data statements of the experts, and of every run that trained the generalist further."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Results of the training run, such as the final loss and the validation loss per domain; empty for private runs."""
    trainable: str | None = None
    """Trainable parameters: a trainer, or a pattern of tensor names. None: the artefact was not trained here."""
    owner: str | None = None
    """Owner of the training data."""
    licence: str | None = None
    """Licence of the artefact."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of expertctl, its main dependencies and the plugins used."""
    format: int = FORMAT
    """Version of the manifest format."""

    @property
    def run(self) -> RunSpec | None:
        """The training run that this artefact came from; None for one that was imported or merged."""
        return self.config if isinstance(self.config, RunSpec) else None

    @property
    def merged(self) -> GeneralistConfig | None:
        """How this generalist was made; None for seeds and experts."""
        return self.config if isinstance(self.config, GeneralistConfig) else None

    @property
    def is_shared(self) -> bool:
        """Whether its owners trained it together, in rounds."""
        return self.merged is not None and self.merged.kind == "shared"

    @property
    def method(self) -> str | None:
        """The method that made a generalist; None for seeds and experts."""
        return self.merged.method if self.merged is not None else None

    @property
    def history(self) -> tuple[ExpertChange, ...]:
        """Experts that joined, left or were replaced, the oldest change first."""
        return self.merged.history if self.merged is not None else ()

    @property
    def tunings(self) -> tuple[Tuning, ...]:
        """Runs that trained a generalist further, the oldest first."""
        return self.merged.tunings if self.merged is not None else ()

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of a generalist's experts, in the order in which the model holds them."""
        if self.merged is not None and self.merged.experts:
            return self.merged.experts
        return tuple(parent.name for parent in self.parents if parent.kind == "expert")

    @property
    def domains(self) -> Mapping[str, DomainStatement]:
        """The domains that this artefact itself was trained on."""
        return self.data.domains

    def write(self, folder: Path) -> None:
        """Write the manifest as the last file of a folder, since its presence means that the folder is complete."""
        content = record_as_json(self)
        ordered = {"format": content.pop("format"), **content, CHECKSUM: ""}
        ordered[CHECKSUM] = hashlib.sha256(json_text(ordered).encode("utf-8")).hexdigest()
        write_json(folder / MANIFEST_NAMES[self.kind], ordered)


def manifest_path(folder: Path) -> Path | None:
    """Return the path of an artefact folder's manifest; None for any other folder."""
    return next((folder / name for name in MANIFEST_NAMES.values() if (folder / name).is_file()), None)


def read_manifest(folder: Path) -> Manifest:
    """Read an artefact's manifest; raises `UserError` if there is none, it has another format, or it is damaged."""
    path = manifest_path(folder)
    if path is None:
        raise UserError(f"{folder} is not a finished artefact: it has none of {', '.join(MANIFEST_NAMES.values())}")
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {content.get('format')}; this version reads format {FORMAT}: make the artefact again, or use "
            "the version of expertctl that made it"
        )
    content.pop(CHECKSUM, None)
    config = content.get("config")
    if config is not None:
        content["config"] = parse_record(_config_class(content.get("kind"), config), config, f"{path}: config")
    return parse_record(Manifest, content, str(path))


def find_manifest(folder: Path) -> Manifest | None:
    """Read an artefact's manifest (see `read_manifest`); None for a folder without one."""
    return read_manifest(folder) if manifest_path(folder) is not None else None


def _config_class(kind: object, config: Mapping[str, Any]) -> type:
    """Return the record that the configuration of an artefact of this kind is read into."""
    if kind == "generalist":
        return GeneralistConfig
    if kind == "seed" and config.keys() <= {field.name for field in fields(ImportedSeed)}:
        return ImportedSeed
    return RunSpec
