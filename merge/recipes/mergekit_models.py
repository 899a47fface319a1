"""What a file of mergekit's names: models, as folders with names of their own, and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...core.artefacts.numeric import dtype_of_word
from ...core.errors import UserError


class NamedModels:
    """Looks for models from the current folder and from the file's, and gives each a name."""

    def __init__(self, path: Path, lines: Mapping[Any, int]) -> None:
        self.path, self.lines = path, lines
        self.models: dict[str, Path] = {}
        self.adapter_bases: dict[str, Path] = {}

    def model(self, given: Any, at: tuple[Any, ...]) -> str:
        """Return the name of a model, noting its folder; `A+B` and `{model, lora}` are an adapter B on A."""
        path, adapter = self._parts(given, at)
        folder = self._folder(path, at)
        if adapter is None:
            return self._named(folder, None)
        return self._named(self._folder(adapter, at), folder)

    def dtype(self, word: str | None, key: str) -> str | None:
        """Return safetensors' name for the dtype that stands under a key."""
        if word is None:
            return None
        try:
            return dtype_of_word(word)
        except UserError as error:
            raise UserError(f"{self.at(key)}: {error}") from None

    def _parts(self, given: Any, at: tuple[Any, ...]) -> tuple[str, str | None]:
        if isinstance(given, str):
            if "+" in given and self._existing(given) is None:
                path, _, adapter = given.partition("+")
                return path, adapter
            return given, None
        if not isinstance(given, dict) or not isinstance(given.get("model"), dict | str):
            raise UserError(f"{self.at(*at)}: a model is a folder, or {{model: {{path: FOLDER}}}}")
        parts = []
        for key in ("model", "lora"):
            one = given.get(key)
            if isinstance(one, dict):
                for other in set(one) - {"path"}:
                    if one[other] is not None:
                        raise UserError(
                            f"{self.at(*at)}: '{other}' of a model is not supported; name a folder"
                        )
                one = one.get("path")
            parts.append(one)
        return str(parts[0]), parts[1]

    def _folder(self, path: str, at: tuple[Any, ...]) -> Path:
        found = self._existing(path)
        if found is None:
            raise UserError(
                f"{self.at(*at)}: there is no folder {path}; nothing is downloaded in a merge: fetch a model first "
                f"with `hf download {path} --local-dir {Path(path).name}`"
            )
        return found

    def _existing(self, path: str) -> Path | None:
        places: list[Callable[[], Path]] = [
            lambda: Path(path).expanduser(),
            lambda: self.path.parent / path,
        ]
        return next((place() for place in places if place().is_dir()), None)

    def _named(self, folder: Path, base: Path | None) -> str:
        """Return the name of a folder: its own, with its parent's before it where that is taken."""
        resolved = folder.resolve()
        for name in (
            resolved.name,
            f"{resolved.parent.name}-{resolved.name}",
            str(resolved).replace("/", "-"),
        ):
            known = self.models.get(name)
            if known is None:
                self.models[name] = resolved
                if base is not None:
                    self.adapter_bases[name] = base.resolve()
                return name
            if known == resolved and self.adapter_bases.get(name) == (
                base.resolve() if base is not None else None
            ):
                return name
        raise UserError(f"{self.path}: too many models are called '{resolved.name}'; rename a folder")

    def at(self, *key: Any) -> str:
        """Return file and line of the nearest key above."""
        place = key
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.path}:{self.lines.get(place, 1)}"
