"""A generalist that was trained further: its folder, and a manifest that says what has seen which text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.files import readable_os_errors
from ...core.artefacts.lineage import (
    TOKENIZER_FILES,
    Manifest,
    Parent,
    digest_of_tensors,
    digest_of_tokenizer,
    digests_of_folder,
    read_manifest,
    tool_versions,
)
from ...core.artefacts.safetensors_io import Checkpoint, checkpoint_files, torch_dtype
from .loop import TrainingLoop
from .run_inputs import RunInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_whole_model(run: RunInputs, model: PreTrainedModel, loop: TrainingLoop) -> None:
    """Write a trained generalist's files, in the dtype of the model it comes from, with that one's tokenizer."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (run.base / name).is_file():
            with readable_os_errors(run.folder / name):
                (run.folder / name).write_bytes((run.base / name).read_bytes())
    if loop.part.finish is not None:
        loop.part.finish(run.folder)
        return
    model.to("cpu", stored_dtype(run.base))
    model.save_pretrained(run.folder)


def stored_dtype(folder: Path) -> Any:
    """Return the torch dtype of a checkpoint's first tensor of floating-point numbers."""
    entries = Checkpoint(checkpoint_files(folder)).entries.values()
    return torch_dtype(next(one.dtype for one in entries if one.dtype.startswith(("F", "BF"))))


def tuned_manifest(run: RunInputs, metrics: Mapping[str, Any], described: Mapping[str, Any]) -> Manifest:
    """Return the manifest of a generalist that was trained from another, or from the seed."""
    spec = run.spec
    base = read_manifest(run.base)
    tensors, files = digests_of_folder(run.folder)
    own = {domain.name: domain.statement() for domain in run.domains}
    tuning = {
        "name": spec.name,
        "trains": spec.trains,
        "options": dict(spec.options),
        "domains": {name: statement.get("digest") for name, statement in own.items()},
        "tokens": spec.training.steps * spec.training.tokens_per_step,
        "from": base.digest,
    }
    # what can be made again from its parts is not made again by that once it was trained
    config = {
        key: value for key, value in base.config.items() if key not in ("recipe", "shard_bytes", "training")
    }
    mixture = {**(config.get("mixture") or {}), **described.get("mixture", {})}
    tuning["experts"] = list(mixture.get("experts") or config.get("weights", ()))
    tuning |= described.get("tuning", {})
    mixture["tuned"] = [*mixture.get("tuned", ()), tuning]
    own_parent = Parent.of(base, spec.base or "seed")
    return Manifest(
        kind="generalist",
        name=spec.name,
        digest=digest_of_tensors(tensors),
        tensors=tensors,
        files=files,
        tokenizer=digest_of_tokenizer(run.folder),
        parents=(own_parent, *(parent for parent in base.parents if base.kind == "generalist")),
        config={
            "method": spec.trains,
            "kind": "moe",
            "weights": {},
            **config,
            **{key: value for key, value in described.items() if key != "tuning"},
            "mixture": mixture,
            "run": spec.content(),
        },
        data={**(base.data if base.kind == "generalist" else {}), spec.name: {"domains": own}},
        metrics=metrics,
        trainable=spec.trains,
        owner=spec.owner,
        licence=spec.licence or base.licence,
        versions=tool_versions(),
    )
