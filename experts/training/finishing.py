"""Writing of a completed run's artefact: weights first, the manifest last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.digests import (
    TRAINING_FOLDER,
    digest_of_tokenizer,
)
from ...core.artefacts.safetensors_io import Checkpoint, tensor_digest, torch_dtype, write_tensors
from ...core.errors import UserError
from ...core.manifests.finishing import finish_artefact
from ...core.manifests.manifest import Manifest, Parent, read_manifest
from ...core.manifests.statements import DataStatement, PrivacyStatement
from ...core.models.loading import WEIGHTS_FILE, checkpoint_tensors
from .loop import TrainingLoop
from .run_inputs import RunInputs
from .tuned_model import tuned_manifest, write_whole_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

OPTIMISER_FILE = Path(TRAINING_FOLDER) / "optimiser.safetensors"


def write_artefact(run: RunInputs, model: PreTrainedModel, loop: TrainingLoop, metrics: Mapping[str, Any]) -> None:
    """Write the weights, then the manifest, which marks the folder as complete."""
    if run.from_scratch:
        write_tensors(run.folder / WEIGHTS_FILE, checkpoint_tensors(model))
        (run.folder / OPTIMISER_FILE).parent.mkdir(exist_ok=True)
        write_tensors(run.folder / OPTIMISER_FILE, loop.optimiser_state())
    elif run.spec.kind == "generalist":
        write_whole_model(run, loop)
        finish_artefact(run.folder, tuned_manifest(run, metrics, loop.part.config))
        return
    else:
        part = loop.part
        trained = part.tensors()
        write_tensors(run.folder / WEIGHTS_FILE, _changed_tensors(run, trained))
        for file, tensors in part.extra_tensors().items():
            write_tensors(run.folder / file, tensors)
    # metrics of a private run are omitted: they are functions of the private text without noise
    private = loop.statement()
    finish_artefact(run.folder, run_manifest(run, metrics if private is None else {}, private))


def _changed_tensors(run: RunInputs, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that differ from the seed's, in the seed's dtype; raises `UserError` if none does."""
    seed = Checkpoint.of_folder(run.layout.seed)
    digests = read_manifest(run.layout.seed).tensors
    changed = {}
    for name, tensor in trained.items():
        if name in seed:
            stored = tensor.to("cpu", torch_dtype(seed.entry(name).dtype))
            if tensor_digest(stored) != digests[name]:
                changed[name] = stored
    if not changed:
        raise UserError(f"training changed no tensor of '{run.spec.name}'; check its learning rate")
    return changed


def run_manifest(
    run: RunInputs,
    metrics: Mapping[str, Any],
    privacy: PrivacyStatement | None = None,
    *,
    trained_tokens: int | None = None,
) -> Manifest:
    """Return the manifest of a run without digests; `trained_tokens` defaults to the run's budget."""
    spec = run.spec
    budget = spec.training.steps * spec.training.tokens_per_step
    return Manifest(
        kind=spec.kind,
        name=spec.name,
        tokenizer=digest_of_tokenizer(run.tokenizer_folder),
        parents=_parents(run),
        config=spec,
        data=DataStatement(
            {domain.name: domain.statement(private=spec.dp is not None) for domain in run.domains},
            budget if trained_tokens is None else trained_tokens,
            privacy,
        ),
        metrics=metrics,
        trainable=spec.trains,
        owner=spec.owner,
        licence=spec.licence,
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
