"""Folder and manifest of a tuned generalist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...core.artefacts.digests import TOKENIZER_FILES
from ...core.artefacts.files import copy_files
from ...core.manifests.generalist import GeneralistConfig, Tuning
from ...core.manifests.manifest import Manifest, Parent, read_manifest
from ...core.manifests.statements import DataStatement
from .loop import TrainingLoop
from .run_inputs import RunInputs


def write_whole_model(run: RunInputs, loop: TrainingLoop) -> None:
    """Write a tuned generalist's files with the dtype and tokenizer of its base model."""
    copy_files(run.base, run.folder, (*TOKENIZER_FILES, "generation_config.json"))
    loop.part.write_model(run.folder, run.base)


def tuned_manifest(run: RunInputs, metrics: Mapping[str, Any], part_config: Mapping[str, Any]) -> Manifest:
    """Return the manifest of a generalist tuned from another generalist or from the seed.

    `part_config` is the trainer's description of the model (`TrainablePart.config`).
    """
    spec = run.spec
    base = read_manifest(run.base)
    config = _tuned_config(run, base, part_config)
    return Manifest(
        kind="generalist",
        name=spec.name,
        parents=(Parent.of(base, spec.base or "seed"), *(base.parents if base.merged is not None else ())),
        config=config,
        expert_data={
            **base.expert_data,
            spec.name: DataStatement({domain.name: domain.statement() for domain in run.domains}),
        },
        metrics=metrics,
        trainable=spec.trains,
        owner=spec.owner,
        licence=spec.licence or base.licence,
    )


def _tuned_config(run: RunInputs, base: Manifest, part_config: Mapping[str, Any]) -> GeneralistConfig:
    spec = run.spec
    changes = {key: value for key, value in part_config.items() if key != "tuning"}
    # a tuned model cannot be reproduced from its merge recipe
    base_config = replace(base.merged or GeneralistConfig(spec.trains, "moe"), recipe=None, shard_bytes=None)
    config = replace(base_config, **changes, run=spec)
    tuning = Tuning(
        name=spec.name,
        trains=spec.trains,
        options=dict(spec.options),
        domains={domain.name: domain.statement().digest for domain in run.domains},
        tokens=spec.training.steps * spec.training.tokens_per_step,
        base_digest=base.digest,
        experts=tuple(config.experts or config.weights),
        **part_config.get("tuning", {}),
    )
    return replace(config, tunings=(*config.tunings, tuning))
