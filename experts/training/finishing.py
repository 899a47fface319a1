"""Turning a run that came to its end into an artefact: weights first, the manifest last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.lineage import (
    TRAINING_FOLDER,
    Manifest,
    Parent,
    digest_of_tensors,
    digest_of_tokenizer,
    digests_of_folder,
    read_manifest,
    tool_versions,
)
from ...core.artefacts.safetensors_io import Checkpoint, tensor_digest, torch_dtype, write_tensors
from ...core.errors import UserError
from ...core.models.loading import WEIGHTS_FILE, checkpoint_tensors
from .loop import TrainingLoop
from .run_inputs import RunInputs
from .tuned_model import tuned_manifest, write_whole_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

OPTIMISER_FILE = Path(TRAINING_FOLDER) / "optimiser.safetensors"


def write_artefact(
    run: RunInputs, model: PreTrainedModel, loop: TrainingLoop, metrics: Mapping[str, Any]
) -> None:
    """Write the weights, then the manifest, whose presence means that the folder is complete."""
    if run.from_scratch:
        write_tensors(run.folder / WEIGHTS_FILE, checkpoint_tensors(model))
        (run.folder / OPTIMISER_FILE).parent.mkdir(exist_ok=True)
        write_tensors(run.folder / OPTIMISER_FILE, loop.optimiser_state())
    elif run.spec.kind == "generalist":
        write_whole_model(run, model, loop)
        tuned_manifest(run, metrics, loop.part.config).write(run.folder)
        return
    else:
        part = loop.part
        trained = part.tensors() if part.tensors is not None else model.state_dict()
        write_tensors(run.folder / WEIGHTS_FILE, _changed_tensors(run, trained))
        for file, tensors in (part.beside() if part.beside is not None else {}).items():
            write_tensors(run.folder / file, tensors)
    # how well it predicts private text is itself a function of that text, without noise
    private = loop.statement()
    run_manifest(run, metrics if private is None else {}, private).write(run.folder)


def _changed_tensors(run: RunInputs, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that differ from the seed's, in the seed's dtype."""
    seed = Checkpoint.of_folder(run.layout.seed)
    digests = read_manifest(run.layout.seed).tensors
    found = {}
    for name, tensor in trained.items():
        if name in seed:
            stored = tensor.to("cpu", torch_dtype(seed.entry(name).dtype))
            if tensor_digest(stored) != digests[name]:
                found[name] = stored
    if not found:
        raise UserError(f"training changed no tensor of '{run.spec.name}'; is its learning rate zero?")
    return found


def run_manifest(
    run: RunInputs,
    metrics: Mapping[str, Any],
    privacy: Mapping[str, Any] | None = None,
    *,
    trained_tokens: int | None = None,
) -> Manifest:
    """Return the manifest of a run's folder, whose tensors are written; `trained_tokens` default to the run's budget."""
    spec = run.spec
    budget = spec.training.steps * spec.training.tokens_per_step
    tensors, files = digests_of_folder(run.folder)
    return Manifest(
        kind=spec.kind,
        name=spec.name,
        digest=digest_of_tensors(tensors),
        tensors=tensors,
        files=files,
        tokenizer=digest_of_tokenizer(run.tokenizer_folder),
        parents=_parents(run),
        config=spec.content(),
        data={
            "domains": {domain.name: domain.statement(private=spec.dp is not None) for domain in run.domains},
            "trained_tokens": budget if trained_tokens is None else trained_tokens,
            **({"privacy": privacy} if privacy is not None else {}),
        },
        metrics=metrics,
        trainable=spec.trains,
        owner=spec.owner,
        licence=spec.licence,
        versions=tool_versions(),
    )


def _parents(run: RunInputs) -> tuple[Parent, ...]:
    if run.from_scratch:
        return ()
    seed = Parent.of(read_manifest(run.layout.seed), "seed", run.spec.start.get("seed"))
    experts = [
        Parent.of(read_manifest(run.layout.experts / name), name, weight)
        for name, weight in run.spec.start.items()
        if name != "seed"
    ]
    return (seed, *experts)
