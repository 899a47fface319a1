"""The exporters `safetensors` and `dense`: a Hugging Face folder that transformers loads without expertctl."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...core.errors import UserError
from ...core.hooks.evaluation import Exporter, ExportInputs, ModelTensors
from ...core.hooks.hookspecs import hookimpl

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMG]?)B?", re.IGNORECASE)
_Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class DenseOptions:
    """Options of a Hugging Face folder."""

    shard_size: str | int = "5GB"
    """Maximum size of a file, such as `500MB`, or a number of bytes."""

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ValueError(f"shard_size is {self.shard_size}; write a size such as 500MB or 5GB")

    @property
    def shard_bytes(self) -> int:
        """The size in bytes; 0 if it is none."""
        match = _SIZE.fullmatch(str(self.shard_size).strip())
        return int(float(match["number"]) * 1000 ** " KMG".index(match["unit"].upper() or " ")) if match else 0


@dataclass(frozen=True)
class SafetensorsOptions(DenseOptions):
    """Options of a Hugging Face folder that may be a mixture."""

    experts: Literal["per_expert", "fused"] = "per_expert"
    """Experts of a mixture as separate tensors, as in published checkpoints and as vLLM reads them, or fused, as transformers
    has them in memory."""


@hookimpl
def exporters() -> list[Exporter]:
    return [
        Exporter(
            "safetensors",
            "a Hugging Face folder, mixtures with separate or fused experts",
            lambda model, options, folder: write_folder(
                model, model.fused if options.experts == "fused" else model.tensors, options.shard_bytes, folder
            ),
            SafetensorsOptions,
        ),
        Exporter("dense", "a Hugging Face folder of a model that is not a mixture", export_dense, DenseOptions),
    ]


def export_dense(model: ExportInputs, options: DenseOptions, folder: Path) -> Sequence[str]:
    """Write a dense model; raises `UserError` for a mixture of experts."""
    from ...merge.generalists.exporting import DISTIL

    if model.is_mixture:
        raise UserError(
            f"'{model.name}' is a mixture of experts; export it with --to safetensors, or for a dense model, {DISTIL}"
        )
    return write_folder(model, model.tensors, options.shard_bytes, folder)


def write_folder(model: ExportInputs, tensors: ModelTensors, shard_bytes: int, folder: Path) -> list[str]:
    """Write a Hugging Face folder and return what the hub would miss in it."""
    from ...core.artefacts.digests import CARD_FILE, TOKENIZER_FILES
    from ...core.artefacts.files import copy_files, write_json, write_text
    from ...core.models.loading import read_config
    from ...core.text.tokenizer import load_tokenizer
    from ...merge.generalists.hub_check import missing_for_hub

    load_tokenizer(model.files)  # raises for a folder that nobody could use
    _write_tensors(tensors, shard_bytes, folder)
    copy_files(model.files, folder, (*TOKENIZER_FILES, "generation_config.json"))
    if model.card:
        write_text(folder / CARD_FILE, model.card)
    if model.config.get("architectures"):
        copy_files(model.files, folder, ["config.json"])
    else:
        write_json(folder / "config.json", {"architectures": [_class_name(read_config(model.files))], **model.config})
    missing = missing_for_hub(folder)
    return [f"for the Hugging Face hub, {folder_name(model)} lacks: {', '.join(missing)}"] if missing else []


def folder_name(model: ExportInputs) -> str:
    """Return how notes call an export."""
    return f"the export of '{model.name}'"


def _class_name(config: object) -> str:
    from transformers import AutoModelForCausalLM

    return str(AutoModelForCausalLM._model_mapping[type(config)].__name__)


def _write_tensors(tensors: ModelTensors, shard_bytes: int, folder: Path) -> None:
    """Write the tensors in files of at most `shard_bytes`, named as transformers does, with an index for several."""
    from ...core.artefacts.files import require_space, write_json
    from ...core.artefacts.safetensors_io import INDEX_FILE, SINGLE_FILE, new_file

    shapes = tensors.shapes()
    shards = list(_shards(shapes, shard_bytes))
    require_space(folder, sum(_num_bytes(shapes[name]) for name in shapes))
    names = [SINGLE_FILE] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with new_file(folder / name, {tensor: shapes[tensor] for tensor in shard}) as file:
            for tensor in shard:
                file.add(tensor, tensors.read(tensor))
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(_num_bytes(shape) for shape in shapes.values())
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


def _shards(shapes: _Shapes, shard_bytes: int) -> Iterator[list[str]]:
    """Yield the tensors of each file, in order; a file is larger than `shard_bytes` only if a single tensor is."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = _num_bytes(shape)
        if names and size + num_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def _num_bytes(shape: tuple[str, tuple[int, ...]]) -> int:
    import math

    from ...core.artefacts.numeric import DTYPES

    return DTYPES[shape[0]].num_bytes * math.prod(shape[1])
