"""Writing a GGUF file tensor by tensor, and reading it back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ....core.artefacts.files import require_space
from ....core.artefacts.safetensors_io import tensor_bytes, torch_dtype
from ....core.errors import UserError
from ....core.hooks.evaluation import ExportInputs
from .metadata import Metadata
from .tensors import GgufTensor
from .vocabulary import Vocabulary

_QUANTIZATION_VERSION = 2
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}


def write_file(
    path: Path, model: ExportInputs, metadata: Metadata, vocabulary: Vocabulary, tensors: Sequence[GgufTensor]
) -> None:
    """Write the file; one tensor is in memory at a time, of a mixture one of all experts of a layer."""
    import gguf

    logging.getLogger("gguf").setLevel(logging.WARNING)  # it writes a line for each setting otherwise
    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[metadata.architecture]]
    writer = gguf.GGUFWriter(path, architecture)
    metadata.write(writer, model)
    vocabulary.write(writer)
    matrices = Counter(tensor.dtype for tensor in tensors if len(tensor.shape) > 1)
    widest = matrices.most_common(1)[0][0]
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[widest]])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.dtype]
        array = _as_array(torch.empty(0, dtype=torch_dtype(tensor.dtype)))
        writer.add_tensor_info(tensor.name, tensor.shape, array.dtype, _num_bytes(tensor), kind)
    require_space(path.parent, sum(_num_bytes(tensor) for tensor in tensors))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_as_array(tensor.make(model)))
    finally:
        writer.close()


def _num_bytes(tensor: GgufTensor) -> int:
    return torch.Size(tensor.shape).numel() * torch_dtype(tensor.dtype).itemsize


def _as_array(tensor: torch.Tensor) -> Any:
    """Return a tensor as a numpy array; numpy has no bfloat16, whose bytes are passed as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def verify_file(path: Path, model: ExportInputs, tensors: Sequence[GgufTensor]) -> None:
    """Read a file back; raises `UserError` unless every tensor, reordering undone, is that of the model, rounded."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if found.keys() != {tensor.name for tensor in tensors}:
        raise UserError(f"{path} has other tensors than were written; the disk may be faulty, export again")
    for tensor in tensors:
        read = found[tensor.name]
        content = torch.frombuffer(bytearray(read.data.tobytes()), dtype=torch_dtype(tensor.dtype))
        is_intact = tuple(reversed([int(size) for size in read.shape])) == tensor.shape
        if is_intact and tensor.constant is None:
            parts = tensor.undo(content.reshape(tensor.shape))
            is_intact = all(
                tensor_bytes(part) == tensor_bytes(tensor.part(model, source))
                for part, source in zip(parts, tensor.sources, strict=True)
            )
        if not is_intact:
            raise UserError(
                f"tensor '{tensor.name}' of {path} is not the model's when it is read back; the disk may be faulty, export again"
            )
