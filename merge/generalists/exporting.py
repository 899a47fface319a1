"""Exports a model for other tools: what all exporters share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.artefacts.digests import CARD_FILE, MANIFEST_NAMES
from ...core.artefacts.files import (
    clear_leftovers,
    exclusive_output,
    is_unfinished,
    new_folder,
    os_errors_as_user_errors,
    refuse_existing,
    replacement_file,
)
from ...core.artefacts.layout import CONFIG_FILE
from ...core.artefacts.licence_card import licence_on_card
from ...core.artefacts.model_config import text_config
from ...core.artefacts.safetensors_io import Checkpoint
from ...core.errors import UserError
from ...core.hooks.evaluation import Exporter, ExportInputs
from ...core.hooks.manager import installed_plugins
from ...core.hooks.options import parse_options
from ...core.hooks.training import Trainer
from ...core.manifests.manifest import Manifest, find_manifest
from ...core.manifests.run import RUN_FILE
from ...core.models.adapters.prompts import is_prompt
from ...core.models.loading import (
    ExpertTensors,
    check_loadable,
    has_own_class,
    read_config,
    require_intact_models,
    seed_of,
)
from ...core.models.stored_names import StoredNames
from ...core.reporting import SILENT, Reporter
from .card import model_card
from .layouts import LaidOutTensors, is_mixture, require_complete

DISTIL = "train one with the objective 'distil' and this model as the teacher"


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    name: str
    """Name of the model."""
    exporter: str
    output: Path
    files: Mapping[str, int]
    """Bytes of each file, by its path in the output's folder."""
    notes: tuple[str, ...]


def export_model(
    folder: Path,
    to: str,
    output: Path,
    options: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Exported:
    """Write a seed, an expert, a generalist or a Hugging Face folder by the exporter `to`.

    Every byte is compared with the manifest first. The output appears under its name when it is complete, and replaces an
    old one only then. Raises `UserError` for a model that is unfinished, damaged or cannot be expressed, and for an output
    that exists, unless `force`, or that lies in the model's folder.
    """
    exporter = installed_plugins().offer(Exporter, to)
    parsed = parse_options(exporter.options, options or {}, f"exporter '{to}'")
    _check_output(exporter, folder, output, force)
    with exclusive_output(output, f"output {output}"):
        model, sources = open_model(folder, reporter)
        for source in sources:
            _require_outside(source, output)
        with _new_output(exporter, output, force) as path:
            notes = tuple(exporter.export(model, parsed, path))
    return Exported(model.name, to, output, _sizes(output), notes)


def _check_output(exporter: Exporter, folder: Path, output: Path, force: bool) -> None:
    refuse_existing(output, force=force, what="output")
    _require_outside(folder, output)
    if output.is_dir() and exporter.output == "file":
        raise UserError(f"{output} is a folder; exporter '{exporter.name}' writes a file: give its name")
    if output.is_file() and exporter.output == "folder":
        raise UserError(f"{output} is a file; exporter '{exporter.name}' writes a folder: give another name")
    for name in (*MANIFEST_NAMES.values(), RUN_FILE, CONFIG_FILE):
        if (output / name).exists():
            raise UserError(f"{output} has a {name}, so it is no export, and is not replaced; choose another name")


def _require_outside(folder: Path, output: Path) -> None:
    """Raise `UserError` if an output lies in a model's folder, or would replace one around it."""
    inner, outer = output.resolve(), folder.resolve()
    if inner.is_relative_to(outer):
        raise UserError(f"{output} is in the folder of the model, which is never changed; choose another place")
    if outer.is_relative_to(inner):
        raise UserError(f"{output} contains the model that is to be exported; choose another place")


@contextmanager
def _new_output(exporter: Exporter, output: Path, force: bool) -> Iterator[Path]:
    """Yield the temporary path of an output, which gets its name on success and is deleted on failure."""
    if exporter.output == "folder":
        with new_folder(output, force=force, what="output") as partial:
            yield partial
        return
    with os_errors_as_user_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(output.parent)
    with replacement_file(output) as file:
        yield Path(file.name)


def _sizes(output: Path) -> dict[str, int]:
    if output.is_file():
        return {output.name: output.stat().st_size}
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return {path.relative_to(output).as_posix(): path.stat().st_size for path in files}


def open_model(folder: Path, reporter: Reporter = SILENT) -> tuple[ExportInputs, list[Path]]:
    """Return a model as exporters take it, and the folders that it is read from.

    Raises `UserError` for a model that is unfinished, damaged, or not one model of a class of transformers.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    manifest = find_manifest(folder)
    if is_unfinished(folder) or (manifest is None and (folder / RUN_FILE).is_file()):
        raise UserError(f"{folder} is not finished; resume its training or its merge first")
    require_intact_models([folder])
    files, source = _source_of(folder, manifest)
    config = check_loadable(files)
    read_config(files)
    names = StoredNames.of_folder(files)
    require_complete(files, source, names)
    model = ExportInputs(
        name=manifest.name if manifest is not None else folder.name,
        files=files,
        config=config,
        tensors=LaidOutTensors(source, names, fused=False),
        fused=LaidOutTensors(source, names, fused=True),
        is_mixture=is_mixture(dict(text_config(config)), names),
        card=_card_of(folder, manifest),
        digest=manifest.digest if manifest is not None else None,
        licence=manifest.licence if manifest is not None else licence_on_card(folder),
        base_models=tuple(parent.name for parent in manifest.parents) if manifest is not None else (),
        reporter=reporter,
    )
    return model, list(dict.fromkeys((folder, files)))


def _source_of(folder: Path, manifest: Manifest | None) -> tuple[Path, Checkpoint | ExpertTensors]:
    """Return the folder with a model's `config.json`, and its tensors; raises `UserError` for an expert that is no model."""
    if manifest is None or manifest.kind != "expert":
        check_loadable(folder)
        if has_own_class(folder):
            raise UserError(
                f"{folder} is an ensemble, a stitched model or a container of experts, which transformers has no class for, so "
                f"no other tool reads it; for a dense model, {DISTIL}"
            )
        return folder, Checkpoint.of_folder(folder)
    if is_prompt(folder):
        raise UserError(
            f"{folder} is a prompt: it changes no tensor of the seed, and no other layout holds it; export the seed"
        )
    trainer = installed_plugins().offers(Trainer).get(manifest.trainable or "")
    if trainer is not None and trainer.restore is not None:
        raise UserError(
            f"{folder} was trained by '{trainer.name}' as a part of a larger model, so it is no model of its own; merge it, and "
            "export the mixture"
        )
    seed = seed_of(folder, manifest)
    return seed, ExpertTensors(Checkpoint.of_folder(seed), folder)


def _card_of(folder: Path, manifest: Manifest | None) -> str:
    """Return the model card of an export; that of the folder if it has no manifest."""
    if manifest is not None:
        return model_card(manifest, manifest.metrics.get("evaluation"), exported=True)
    card = folder / CARD_FILE
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
