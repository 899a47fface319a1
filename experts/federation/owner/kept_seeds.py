"""Seed store of an owner: seeds downloaded in parts or copied from a folder, verified, and stored by digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ....core.artefacts.digests import TRAINING_FOLDER
from ....core.artefacts.files import inside, link_or_copy, new_folder, remove_tree, require_regular
from ....core.artefacts.safetensors_io import header_bytes
from ....core.errors import UserError
from ....core.manifests.manifest import read_manifest
from ....core.manifests.verification import require_intact
from ..protocol.delivery import MAX_HEADER
from ..protocol.parts import PartsWriter, parts_of
from ..protocol.requests import ExpertRequest

MAX_DOCUMENT = 256 << 20
"""Largest file of a seed that is not weights, such as a tokenizer, in bytes."""


class KeptSeeds:
    """Complete seeds in `DIGEST/` and partial downloads in `DIGEST.incoming/` of one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def has(self, request: ExpertRequest) -> bool:
        return (self.folder(request) / "seed.json").is_file()

    def folder(self, request: ExpertRequest) -> Path:
        """Return the folder of a request's seed, which need not exist yet."""
        return inside(self._root, request.seed)

    def writers(self, request: ExpertRequest) -> list[PartsWriter]:
        """Return writers for the seed's files; call `complete` after the last part."""
        folder = self._incoming(request)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return [PartsWriter(folder, file) for file in request.seed_files]

    def complete(self, request: ExpertRequest) -> Path:
        """Verify a downloaded seed against the digests of its files and tensors, and store it."""
        for writer in self.writers(request):
            writer.finish()
        _require_readable(request, self._incoming(request))
        folder = self._store(request, self._incoming(request))
        remove_tree(self._incoming(request))
        return folder

    def copy(self, request: ExpertRequest, folder: Path) -> Path:
        """Store a seed from a folder; raises `UserError` if it is not the requested seed."""
        _require_readable(request, folder)
        digest = read_manifest(folder).digest
        if digest != request.seed:
            raise UserError(
                f"{folder} holds seed {digest[:12]}, the request needs {request.seed[:12]}; name another folder"
            )
        for file in request.seed_files:
            path = inside(folder, file.name)
            if not path.is_file() or parts_of(require_regular(path.resolve()), file.part_size).sha256 != file.sha256:
                raise UserError(f"{path} differs from the requested seed's; fetch the seed again, or omit --seed")
        return self._store(request, folder)

    def drop(self, request: ExpertRequest) -> None:
        """Delete a request's seed and its partial download."""
        remove_tree(self.folder(request))
        remove_tree(self._incoming(request))

    def _incoming(self, request: ExpertRequest) -> Path:
        folder = self.folder(request)
        return folder.with_name(f"{folder.name}.incoming")

    def _store(self, request: ExpertRequest, source: Path) -> Path:
        target, manifest = self.folder(request), read_manifest(source)
        # the seed's training state stays with the coordinator
        tensors, files = _without_training(manifest.tensors), _without_training(manifest.files)
        with new_folder(target, force=True, what="seed") as partial:
            for file in request.seed_files:
                if file.name != "seed.json":
                    link_or_copy(source / file.name, partial / file.name)
            replace(manifest, tensors=tensors, files=files).write(partial)
            if require_intact(partial).digest != request.seed:
                raise UserError(f"the files received are not seed {request.seed[:12]}; fetch it again")
        return target


def _require_readable(request: ExpertRequest, folder: Path) -> None:
    """Raise `UserError` for a seed whose documents or headers, which are read into memory whole, are too large."""
    for file in request.seed_files:
        path = inside(folder, file.name)
        if not path.is_file():
            continue
        require_regular(path.resolve())
        is_manifest = file.name == "seed.json"
        size = header_bytes(path) if path.suffix == ".safetensors" else path.stat().st_size
        most = MAX_HEADER if is_manifest or path.suffix == ".safetensors" else MAX_DOCUMENT
        if size > most:
            raise UserError(f"{path} has a document of {size:,} bytes, and {most:,} is the most; the seed is refused")


def _without_training(digests: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in digests.items() if not name.startswith(f"{TRAINING_FOLDER}/")}
