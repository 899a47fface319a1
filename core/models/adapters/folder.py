"""The files of an adapter's folder, by PEFT's names."""

from __future__ import annotations

from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter of a model instead of tensors of the model itself."""
    return (folder / ADAPTER_CONFIG).is_file()
