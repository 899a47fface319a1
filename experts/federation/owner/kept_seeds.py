"""The seeds that an owner has: fetched in parts or taken from a folder, checked byte by byte, kept by digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ....core.artefacts.files import link_or_copy, new_folder, remove_tree
from ....core.artefacts.lineage import TRAINING_FOLDER, read_manifest, require_intact
from ....core.errors import UserError
from ..protocol.parts import PartsWriter, is_digest, parts_of
from ..protocol.requests import ExpertRequest


class KeptSeeds:
    """The seeds in one folder, `DIGEST/` each, and what has arrived of others in `DIGEST.incoming/`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def has(self, request: ExpertRequest) -> bool:
        return (self.folder(request) / "seed.json").is_file()

    def folder(self, request: ExpertRequest) -> Path:
        """Return where a request's seed is, or will be."""
        if not is_digest(request.seed):
            raise UserError(f"'{request.seed:.40}' is no digest of a seed")
        return self._root / request.seed

    def writers(self, request: ExpertRequest) -> list[PartsWriter]:
        """Return what gathers the seed's files; `settle` comes after the last part."""
        folder = self._incoming(request)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return [PartsWriter(folder, file) for file in request.seed_files]

    def settle(self, request: ExpertRequest) -> Path:
        """Check the seed that has arrived, against its digest and byte by byte, and keep it."""
        if self.has(request):
            return self.folder(request)
        files = [writer.finish() for writer in self.writers(request)]
        kept = self._keep(request, {path.name: path for path in files})
        remove_tree(self._incoming(request))
        return kept

    def use(self, request: ExpertRequest, folder: Path) -> Path:
        """Keep a seed that lies in a folder already; raises `UserError` for another one than was asked for."""
        if self.has(request):
            return self.folder(request)
        found = read_manifest(folder)
        if found.digest != request.seed:
            raise UserError(
                f"{folder} is seed {found.digest[:12]}, and {request.seed[:12]} is asked for; name another folder"
            )
        wanted = {file.name: file for file in request.seed_files}
        for name, file in wanted.items():
            if not (folder / name).is_file() or parts_of(folder / name, file.part_size).sha256 != file.sha256:
                raise UserError(
                    f"{folder / name} is not the seed's; fetch the seed again, or leave --seed out"
                )
        return self._keep(request, {name: folder / name for name in wanted})

    def drop(self, request: ExpertRequest) -> None:
        """Remove a request's seed, and what has arrived of it."""
        remove_tree(self.folder(request))
        remove_tree(self._incoming(request))

    def _incoming(self, request: ExpertRequest) -> Path:
        folder = self.folder(request)
        return folder.with_name(f"{folder.name}.incoming")

    def _keep(self, request: ExpertRequest, files: Mapping[str, Path]) -> Path:
        target = self.folder(request)
        with new_folder(target, force=True, what="seed") as partial:
            for name, path in files.items():
                if name != "seed.json":
                    link_or_copy(path, partial / name)
            # the state of the seed's own training stays with the coordinator
            manifest = read_manifest(next(iter(files.values())).parent)
            replace(
                manifest, tensors=_without_training(manifest.tensors), files=_without_training(manifest.files)
            ).write(partial)
            if require_intact(partial).digest != request.seed:
                raise UserError(f"what arrived is not seed {request.seed[:12]}; fetch it again")
        return target


def _without_training(digests: Mapping[str, str]) -> dict[str, str]:
    return {name: one for name, one in digests.items() if not name.startswith(f"{TRAINING_FOLDER}/")}
