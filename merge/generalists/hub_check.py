"""What the Hugging Face hub asks of a model folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...core.artefacts.digests import CARD_FILE
from ...core.artefacts.files import read_json
from ...core.artefacts.licence_card import card_metadata

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_KEYS = {
    "license": "a licence",
    "base_model": "its base models",
    "language": "its languages",
    "tags": "tags",
    "pipeline_tag": "its task",
    "library_name": "its library",
}
"""Keys of a card's metadata block -> what they state."""


def missing_for_hub(folder: Path) -> list[str]:
    """Return what a model folder lacks on the hub, a phrase each; empty for a complete one."""
    return list(_missing(folder))


def _missing(folder: Path) -> Iterator[str]:
    metadata = card_metadata(folder)
    if metadata is None:
        yield f"{CARD_FILE} with a metadata block"
    else:
        for key, what in _KEYS.items():
            if not metadata.get(key):
                yield f"{key} in {CARD_FILE} ({what})"
        bases = metadata.get("base_model") or ()
        for base in [bases] if isinstance(bases, str) else bases:
            if "/" not in str(base):
                yield f"OWNER/NAME of the base model '{base}' in {CARD_FILE}"
    config = folder / "config.json"
    if not config.is_file() or not read_json(config).get("architectures"):
        yield "architectures in config.json"
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        yield "a tokenizer"
    if not any(folder.glob("*.safetensors")):
        yield "weights in safetensors"
    for path in sorted(folder.rglob("*")):
        if path.suffix in _PICKLES:
            yield f"{path.relative_to(folder)} as safetensors: it is pickled"
