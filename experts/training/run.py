"""Execution of one run: from `run.json` to the finished artefact, with resume from the last checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...core.artefacts.files import clear_leftovers, remove_tree
from ...core.errors import Interrupted, UserError
from ...core.hooks.events import ExpertFinished
from ...core.hooks.manager import installed_plugins
from ...core.hooks.options import parse_options
from ...core.hooks.training import Trainer, TrainingContext
from ...core.manifests.manifest import read_manifest
from ...core.manifests.run import STATE_FOLDER, is_finished
from ...core.models.loading import require_intact_models
from ...core.models.outline import Outline
from ...core.models.scoring import total_loss
from ...core.reporting import Reporter
from ...core.text.block_order import BalancedUnion
from ...core.text.conversation_blocks import blocks_of
from ..runs.branching import require_opacus
from ..runs.replaced import delete_backup, restore_backup
from ..runs.trainable import models_of_trainer, trainer_for
from ..text.corpora import domain_config, require_text
from .checkpointing import BackgroundCheckpoints, drop_checkpoints_after, restore_latest, save_checkpoint
from .distributed.ranks import ALONE, SHARDED, Ranks, Strategy
from .distributed.replicas import require_divisible
from .finishing import write_artefact
from .metrics_log import MetricsLog
from .privacy.accounting import mechanism_for
from .privacy.noise import Releases, secret_source, seeded_source
from .run_inputs import RunInputs
from .starting_point import (
    annealing_blocks,
    inherit_optimiser,
    prepared_objective,
    starting_model,
    starting_outline,
    training_blocks,
    training_text,
)
from .steps.guards import Spike
from .steps.loop import TrainingLoop
from .steps.precision import autocast
from .tracked_run import tracked

LOADED_WHOLE = (
    "every process loads the whole model before it keeps its part: this trainer reads the weights first, or only transformers "
    "can load this model's files"
)


def train_run(
    folder: Path,
    reporter: Reporter,
    stopped: Callable[[], bool],
    ranks: Ranks = ALONE,
    strategy: Strategy = "ddp",
) -> None:
    """Train the run in `folder` to its end or until `stopped()`; returns at once if it is finished.

    Progress is reported about every half second. All processes of a run call this, with the same `strategy` if there are
    several. Raises `Interrupted` after a stop, with the state saved.
    """
    finished = is_finished(folder)
    num_finished = int(sum(ranks.share([finished])))
    if num_finished not in (0, ranks.world):
        raise UserError(
            f"{folder} is finished for {num_finished} of {ranks.world} processes; start all in one folder that they share"
        )
    if finished:
        if ranks.is_main:
            remove_tree(folder / STATE_FOLDER)
        return
    with ranks.main_first():
        if ranks.is_main:
            clear_leftovers(folder, below=True)  # subfolders hold the checkpoints and the optimiser state
        run = RunInputs.of_folder(folder)
    ranks.require_agreement([run.digest, strategy], "run, text, strategy or torch")
    require_divisible(run.spec.training.batch_size, ranks)
    trainer = trainer_for(run.spec.trains)
    options = parse_options(trainer.options, run.spec.options, f"trainer '{trainer.name}'")
    shares = ranks.world > 1 and strategy in SHARDED and run.spec.kind != "seed"
    outline = starting_outline(run, ranks) if shares and not trainer.reads_weights else None
    model = starting_model(run) if outline is None else outline.model
    loop = _loop(run, trainer, model, options, ranks, strategy, outline)
    if shares and outline is None:
        loop.part.notes = (*loop.part.notes, LOADED_WHOLE)
    if run.spec.kind == "generalist" and ranks.is_main:
        delete_backup(folder)
    inherit_optimiser(run, loop)
    start_step = restore_latest(loop, folder / STATE_FOLDER, run.data_digests)
    if not ranks.is_main:  # dropout differs between the rows of a batch
        torch.manual_seed(run.spec.training.seed + 1_000_003 * ranks.rank + start_step)
    with tracked(run, start_step, is_main=ranks.is_main) as trackers:
        log = MetricsLog(run, reporter, loop.part, trackers, loop.notes) if ranks.is_main else None
        if log is not None:
            log.open(start_step)
        loss = _train(run, loop, log, stopped)
        loop.average.apply(loop.parameters)
        validation = _validation_losses(run, loop)
        if log is not None:
            log.validation(loop.step, validation)
        write_artefact(run, model, loop, {"loss": loss, "validation_loss": validation})
        if ranks.is_main:
            trackers.summary["digest"] = read_manifest(folder).digest
    if not ranks.is_main:
        return
    if run.spec.kind != "generalist":
        installed_plugins().expert_finished(ExpertFinished(run.spec.name, folder))
    remove_tree(folder / STATE_FOLDER)


def _loop(
    run: RunInputs,
    trainer: Trainer,
    model: PreTrainedModel,
    options: Any,
    ranks: Ranks,
    strategy: Strategy,
    outline: Outline | None,
) -> TrainingLoop:
    """Return the training loop for the trainer's trainable part, a private loop if the run has a privacy budget."""
    dp, training, state = run.spec.dp, run.spec.training, run.folder / STATE_FOLDER
    releases = None
    if dp is not None:
        require_opacus()
        if ranks.world > 1:
            raise UserError("training with differential privacy runs in one process; start it without --nproc")
        for domain in run.domains:
            require_text(domain.name, domain_config(run.project, domain.name), "training with differential privacy")
        source = seeded_source(training.seed) if dp.noise == "seeded" else secret_source(state)
        releases = Releases(source, dp.embedding_noise)
    text = training_text(run, releases) if trainer.uses_text else None
    objective = prepared_objective(run, model, ranks.rank)  # before the trainer changes the model
    try:
        models = {name: run.layout.artefact(name) for name in models_of_trainer(run.spec.trains, run.spec.options)}
        require_intact_models(models.values())
        context = TrainingContext(model, options, text, training.batch_size * training.accumulation, models)
        part = trainer.prepare(context)
    except UserError:
        if run.spec.kind == "generalist" and not state.exists():
            restore_backup(run.folder)  # the trainer refused before the run started
        raise
    blocks = training_blocks(run, part.shares)
    if dp is None or releases is None:
        separator = next(iter(run.domains[0].train.markers), None)
        return TrainingLoop(
            part,
            blocks,
            training,
            ranks,
            strategy,
            separator=separator,
            objective=objective,
            outline=outline,
            annealing=annealing_blocks(run),
        )
    from .privacy.loop import PrivateTrainingLoop

    assert not isinstance(blocks, BalancedUnion), "an expert has one domain"
    mechanism = mechanism_for(dp, training, len(blocks), releases.history)
    plain = training.model_copy(
        update={"precision": "float32", "chunked_loss": False, "activation_checkpointing": False}
    )
    return PrivateTrainingLoop(part, blocks, plain, dp, mechanism, releases.source)


def _train(run: RunInputs, loop: TrainingLoop, log: MetricsLog | None, stopped: Callable[[], bool]) -> float:
    """Run the loop to its end with logging, validation and checkpoints; return the last loss, in nats per token.

    The last step is never checkpointed, so a resumed run has at least one step left.
    """
    config, state = run.spec.training, run.folder / STATE_FOLDER
    every = config.validate_every or max(config.steps // 4, 1)
    saved_at, is_saved, loss = time.monotonic(), any(state.glob("step-*")), float("nan")
    background = BackgroundCheckpoints()
    for report in loop.steps():
        if log is not None:
            log.step(report)
        loss = loss if report.skipped else float(report.loss)
        spike = loop.guards.watch(report.step, loss, skipped=report.skipped)
        if spike is not None and is_saved:
            background.wait()
            step = _roll_back(run, loop, spike)
            if log is not None:
                log.rolled_back(step, report.step, spike)
            continue
        is_due = time.monotonic() - saved_at >= config.checkpoint_seconds or (loop.guards.is_ready and not is_saved)
        # a signal reaches the processes at different steps, and they must stop at the same one
        is_stopped, is_due = map(bool, loop.ranks.share([stopped(), loop.ranks.is_main and is_due]))
        if report.step == config.steps:
            break
        if is_stopped or (is_due and loop.guards.is_calm):
            if config.background_checkpoints and not is_stopped:
                background.save(loop, state, run.data_digests)
            else:
                background.wait()
                save_checkpoint(loop, state, run.data_digests)
            saved_at, is_saved = time.monotonic(), True
        if is_stopped:
            raise Interrupted(f"stopped at step {report.step} of {config.steps}; rerun the same command to resume")
        if report.step % every == 0:
            losses = _validation_losses(run, loop)
            if log is not None:
                log.validation(report.step, losses)
    background.wait()
    if not math.isfinite(loss):
        raise UserError(
            "training diverged: the loss or gradient of every step is not finite; start over with another seed model"
        )
    return loss


def _roll_back(run: RunInputs, loop: TrainingLoop, spike: Spike) -> int:
    """Return to the last checkpoint before a spike, but go on with the text after it; return the checkpoint's step."""
    state, rollbacks = run.folder / STATE_FOLDER, loop.guards.rollbacks
    positions = [stream.position for stream in loop.streams]
    with loop.ranks.main_first():
        if loop.ranks.is_main:
            drop_checkpoints_after(
                state, spike.first_step - 2
            )  # the step before the first high loss may have caused it
    step = restore_latest(loop, state, run.data_digests)
    loop.guards.rollbacks = rollbacks + 1
    for stream, position in zip(loop.streams, positions, strict=True):
        stream.position = position
    save_checkpoint(loop, state, run.data_digests)  # so that a crash does not bring the skipped text back
    return step


def _validation_losses(run: RunInputs, loop: TrainingLoop) -> dict[str, float]:
    """Return each domain's mean loss on its first validation blocks, in nats per token."""
    config = run.spec.training
    loop.module.eval()
    losses: dict[str, float] = {}
    with torch.no_grad(), autocast(config, loop.device)():
        for number, domain in enumerate(run.all_domains):
            loop.part.begin_batch([number])
            blocks = blocks_of(domain.open("valid"), config.sequence_length)
            batches = blocks.windows(loop.rows_at_a_time, limit=config.validation_blocks)
            total, count = total_loss(loop.module, batches)
            losses[domain.name] = total / max(count, 1)
    loop.module.train()
    return losses
