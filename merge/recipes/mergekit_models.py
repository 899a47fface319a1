"""Resolves the model paths and dtypes of a mergekit configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.artefacts.numeric import dtype_of_word
from ...core.errors import UserError


class NamedModels:
    """Models of a file by unique name; paths are relative to the current folder or to the folder of the file."""

    def __init__(self, path: Path, lines: Mapping[Any, int]) -> None:
        self.path, self.lines = path, lines
        self.models: dict[str, Path] = {}
        self.adapter_bases: dict[str, Path] = {}

    def model(self, reference: Any, key: tuple[Any, ...]) -> str:
        """Register a model (`A+B`, `{model, lora}`: adapter on model); return its name, or raise `UserError`."""
        path, adapter = self._split(reference, key)
        folder = self._folder(path, key)
        if adapter is None:
            return self._unique_name(folder, None)
        return self._unique_name(self._folder(adapter, key), folder)

    def dtype(self, word: str | None, key: str) -> str | None:
        """Return the safetensors name of the dtype under a key."""
        if word is None:
            return None
        try:
            return dtype_of_word(word)
        except UserError as error:
            raise UserError(f"{self.at(key)}: {error}") from None

    def _split(self, reference: Any, at: tuple[Any, ...]) -> tuple[str, str | None]:
        if isinstance(reference, str):
            if "+" in reference and self._find_folder(reference) is None:
                path, _, adapter = reference.partition("+")
                return path, adapter
            return reference, None
        if not isinstance(reference, dict) or not isinstance(reference.get("model"), dict | str):
            raise UserError(f"{self.at(*at)}: a model is a folder, or {{model: {{path: FOLDER}}}}")
        parts = []
        for key in ("model", "lora"):
            part = reference.get(key)
            if isinstance(part, dict):
                for setting in set(part) - {"path"}:
                    if part[setting] is not None:
                        raise UserError(f"{self.at(*at)}: '{setting}' of a model is not supported; name a folder")
                part = part.get("path")
            parts.append(part)
        return str(parts[0]), parts[1]

    def _folder(self, path: str, at: tuple[Any, ...]) -> Path:
        folder = self._find_folder(path)
        if folder is None:
            raise UserError(
                f"{self.at(*at)}: there is no folder {path}; merges do not download models, so download it first "
                f"with `hf download {path} --local-dir {Path(path).name}`"
            )
        return folder.resolve()

    def _find_folder(self, path: str) -> Path | None:
        return next((folder for folder in (Path(path).expanduser(), self.path.parent / path) if folder.is_dir()), None)

    def _unique_name(self, folder: Path, base: Path | None) -> str:
        """Return a unique name for a folder: the folder's name, with its parent's name as a prefix if it is taken."""
        for name in (folder.name, f"{folder.parent.name}-{folder.name}", str(folder).replace("/", "-")):
            if name not in self.models:
                self.models[name] = folder
                if base is not None:
                    self.adapter_bases[name] = base
            if (self.models[name], self.adapter_bases.get(name)) == (folder, base):
                return name
        raise UserError(f"{self.path}: too many models are called '{folder.name}'; rename a folder")

    def at(self, *key: Any) -> str:
        """Return `file:line` of a key, or of its nearest parent in the file."""
        place = key
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.path}:{self.lines.get(place, 1)}"
