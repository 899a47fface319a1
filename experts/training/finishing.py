"""Writing of a completed run's artefact: weights first, the manifest last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.digests import TOKENIZER_FILES, TRAINING_FOLDER, digest_of_tokenizer
from ...core.artefacts.files import copy_files, write_json
from ...core.artefacts.safetensors_io import Checkpoint, tensor_digest, torch_dtype
from ...core.errors import UserError
from ...core.hooks.options import parse_options
from ...core.manifests.finishing import finish_artefact
from ...core.manifests.generalist import GeneralistConfig, Tuning
from ...core.manifests.manifest import Manifest, Parent, read_manifest
from ...core.manifests.statements import DataStatement, PrivacyStatement
from ...core.models.loading import WEIGHTS_FILE
from ...core.models.stored_names import StoredNames, stored_tensors
from ..runs.trainable import makes_adapter, models_read, trainer_for
from .run_inputs import RunInputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .distributed.replicas import Replica
    from .steps.loop import TrainingLoop

OPTIMISER_FILE = Path(TRAINING_FOLDER) / "optimiser.safetensors"


def write_artefact(run: RunInputs, model: PreTrainedModel, loop: TrainingLoop, metrics: Mapping[str, Any]) -> None:
    """Write the weights, then the manifest, which marks the folder as complete. All processes of a run must call this.

    Tensors of a sharded model are gathered one at a time, except for generalists and for families whose tensors have another
    layout in files: their model is put together in the main process.
    """
    part, is_main = loop.part, loop.ranks.is_main
    has_adapter = makes_adapter(run.spec.trains)
    if run.spec.kind == "generalist" or not (has_adapter or _is_stored_as_in_memory(model)):
        loop.replica.assemble()
        if not is_main:
            return
    if run.spec.kind == "generalist":
        copy_files(run.base, run.folder, (*TOKENIZER_FILES, "generation_config.json"))
        part.write_model(run.folder, run.base)
        finish_artefact(run.folder, _tuned_manifest(run, metrics, part.config))
        return
    if run.spec.kind == "seed":
        loop.replica.write(run.folder / WEIGHTS_FILE, stored_tensors(model))
        (run.folder / OPTIMISER_FILE).parent.mkdir(exist_ok=True)
        loop.replica.write(run.folder / OPTIMISER_FILE, loop.optimiser_state())
    else:
        if not has_adapter:
            _write_changed_tensors(run, part.tensors(), loop.replica)
        for file, tensors in part.extra_tensors().items():
            loop.replica.write(run.folder / file, tensors)
        if is_main:
            _write_side_documents(run)
    if is_main:
        # metrics of a private run are omitted: they are functions of the private text without noise
        private = loop.statement()
        finish_artefact(run.folder, run_manifest(run, metrics if private is None else {}, private))


def _write_side_documents(run: RunInputs) -> None:
    trainer = trainer_for(run.spec.trains)
    if trainer.side_documents is not None:
        options = parse_options(trainer.options, run.spec.options, f"trainer '{trainer.name}'")
        for name, content in trainer.side_documents(run.base, options).items():
            write_json(run.folder / name, content)


def _is_stored_as_in_memory(model: PreTrainedModel) -> bool:
    """Return whether files have a model's tensors in the layout of memory; names may differ."""
    return all(group.is_renamed for group in StoredNames(model).groups)


def _write_changed_tensors(run: RunInputs, trained: Mapping[str, Tensor], replica: Replica) -> None:
    """Write the tensors that differ from the seed's, in the seed's dtype; raises `UserError` if none does.

    `trained` has names in memory, the file those of the seed's files.
    """
    seed = Checkpoint.of_folder(run.layout.seed)
    digests = read_manifest(run.layout.seed).tensors
    tensors = {name: tensor for name, tensor in sorted(_as_in_seed(run, seed, trained).items()) if name in seed}
    dtypes = {name: torch_dtype(seed.entry(name).dtype) for name in tensors}
    is_changed = [
        replica.ranks.is_main and tensor_digest(whole.to("cpu", dtypes[name])) != digests[name]
        for name, whole in ((name, replica.full(tensor)) for name, tensor in tensors.items())
    ]
    changed = [name for name, differs in zip(tensors, replica.ranks.share(is_changed), strict=True) if differs]
    if not changed:
        raise UserError(f"training changed no tensor of '{run.spec.name}'; check its learning rate")
    replica.write(run.folder / WEIGHTS_FILE, {name: tensors[name].to(dtypes[name]) for name in changed})


def _as_in_seed(run: RunInputs, seed: Checkpoint, trained: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return trained tensors by the names and in the layout of the seed's files."""
    if all(name in seed for name in trained):
        return trained
    names = StoredNames.of_folder(run.layout.seed)
    converted = {name: tensor.to("cpu") for name, tensor in trained.items() if name not in seed}
    stored = names.to_stored(converted, lambda group: names.read(seed, group))
    return {name: tensor for name, tensor in trained.items() if name in seed} | stored


def run_manifest(
    run: RunInputs,
    metrics: Mapping[str, Any],
    privacy: PrivacyStatement | None = None,
    *,
    trained_tokens: int | None = None,
) -> Manifest:
    """Return the manifest of a run without digests; `trained_tokens` defaults to the run's budget."""
    spec = run.spec
    folders = {name: run.layout.seed if name == "seed" else run.layout.experts / name for name in spec.start}
    read = models_read(spec.trains, spec.options, spec.training)
    others = {name: run.layout.artefact(name) for name in read}
    parents = {"seed": run.layout.seed, **others, **folders} if spec.kind != "seed" else {}
    return Manifest(
        kind=spec.kind,
        name=spec.name,
        tokenizer=digest_of_tokenizer(run.tokenizer_folder),
        parents=tuple(Parent.of(read_manifest(path), name, spec.start.get(name)) for name, path in parents.items()),
        config=spec,
        data=DataStatement(
            {domain.name: domain.statement(private=spec.dp is not None) for domain in run.domains},
            spec.training.trained_tokens if trained_tokens is None else trained_tokens,
            privacy,
            {domain.name: domain.statement() for domain in run.annealing},
        ),
        metrics=metrics,
        trainable=spec.trains,
        owner=spec.owner,
        licence=spec.licence,
    )


def _tuned_manifest(run: RunInputs, metrics: Mapping[str, Any], part_config: Mapping[str, Any]) -> Manifest:
    """Return the manifest of a generalist tuned from another generalist or from the seed.

    `part_config` is the trainer's description of the model (`TrainablePart.config`).
    """
    spec, base = run.spec, read_manifest(run.base)
    statements = {domain.name: domain.statement() for domain in run.domains}
    changes = {key: value for key, value in part_config.items() if key != "tuning"}
    # a tuned model cannot be reproduced from its merge recipe
    base_config = replace(base.merged or GeneralistConfig(spec.trains, "moe"), recipe=None, shard_bytes=None)
    config = replace(base_config, **changes, run=spec)
    tuning = Tuning(
        name=spec.name,
        trains=spec.trains,
        options=dict(spec.options),
        domains={name: statement.digest for name, statement in statements.items()},
        tokens=spec.training.trained_tokens,
        base_digest=base.digest,
        experts=tuple(config.experts or config.weights),
        **part_config.get("tuning", {}),
    )
    return Manifest(
        kind="generalist",
        name=spec.name,
        parents=(
            Parent.of(base, spec.base or "seed"),
            *(base.parents if base.merged is not None else ()),
            *(
                Parent.of(read_manifest(run.layout.artefact(name)), name)
                for name in models_read(spec.trains, spec.options, spec.training)
            ),
        ),
        config=replace(config, tunings=(*config.tunings, tuning)),
        expert_data={**base.expert_data, spec.name: DataStatement(statements)},
        metrics=metrics,
        trainable=spec.trains,
        owner=spec.owner,
        licence=spec.licence or base.licence,
    )
