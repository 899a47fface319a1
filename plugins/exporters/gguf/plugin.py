"""The exporter `gguf`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ....core.errors import UserError
from ....core.hooks.evaluation import Exporter, ExportInputs
from ....core.hooks.hookspecs import hookimpl


@dataclass(frozen=True)
class GgufOptions:
    """Options of a GGUF file."""

    dtype: Literal["auto", "f32", "f16", "bf16"] = "auto"
    """Dtype of the matrices; `auto`: as stored. Vectors, norms and routers are always float32."""
    pre: str | None = None
    """Name that llama.cpp has for the rule that splits text before the BPE (`tokenizer.ggml.pre`). Not set: recognised."""
    verify: bool = True
    """Read the file back and compare every tensor."""


@hookimpl
def exporters() -> list[Exporter]:
    return [Exporter("gguf", "a GGUF file for llama.cpp and tools built on it", export_gguf, GgufOptions, "file")]


def export_gguf(model: ExportInputs, options: GgufOptions, path: Path) -> Sequence[str]:
    """Write a model as a GGUF file; raises `UserError` if the format or llama.cpp's family cannot express it."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("exporter 'gguf' needs the package gguf: pip install 'expertctl[gguf]'")
    from .families import family_of
    from .file import verify_file, write_file
    from .metadata import Metadata
    from .tensors import plan_tensors
    from .vocabulary import read_vocabulary

    family = family_of(model)
    metadata = Metadata.of(model, family)
    vocabulary = read_vocabulary(model.files, metadata.vocabulary_rows, options.pre)
    tensors = plan_tensors(model, family, options.dtype)
    write_file(path, model, metadata, vocabulary, tensors)
    if options.verify:
        verify_file(path, model, tensors)
    return [*metadata.notes, *vocabulary.notes]
