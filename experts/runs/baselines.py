"""Baselines of Branch-Train-Merge: a compute-matched dense model, and experts of random splits.

The dense model continues from the seed on all domains, with the same number of tokens from each. It takes as many
steps as one expert with a batch size multiplied by the number of experts: the paper's protocol, in which each expert
has its share of the dense model's batch. With few tokens, more steps of a smaller batch learn more, so the same
tokens can also be spent at an expert's batch size. The random-split experts train on equal random slices of the
blocks of all domains; an ensemble of them separates the effect of domains from that of having several models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...core.artefacts.layout import Layout
from ...core.errors import UserError, unknown_name
from ...core.manifests.run import RUN_FILE, RunSpec, read_run
from .branching import parent_digests, write_run

DENSE = "dense"
DENSE_SAME_BATCH = "dense-same-batch"


def start_dense(
    layout: Layout, *, experts: Sequence[str] | None = None, same_batch: bool = False, force: bool = False
) -> Path:
    """Set up the run of the baseline of `experts` (default: all) and return its folder; an unfinished run is resumed.

    `same_batch` keeps an expert's batch size and multiplies its steps by the number of experts, instead of the reverse.
    """
    matched = trained_experts(layout, experts)
    _refuse_annealing(matched)
    training = matched[0].training
    tokens = sum(expert.training.trained_tokens for expert in matched)
    batch = training.batch_size if same_batch else training.batch_size * len(matched)
    spec = RunSpec(
        kind="expert",
        name=DENSE_SAME_BATCH if same_batch else DENSE,
        domains=_all_domains(matched),
        training=training.model_copy(update={"tokens": tokens, "batch_size": batch}),
        parents=parent_digests(layout, {"seed": 1.0}),
    )
    return _start(layout, spec, force=force)


def start_random_split(layout: Layout, *, force: bool = False) -> list[Path]:
    """Set up one run per finished expert, each on a random slice of all text; return their folders."""
    experts = trained_experts(layout)
    _refuse_annealing(experts)
    folders = []
    for index, expert in enumerate(experts):
        spec = RunSpec(
            kind="expert",
            name=f"random-{index}",
            domains=_all_domains(experts),
            training=expert.training,
            trains=expert.trains,
            options=expert.options,
            parents=parent_digests(layout, {"seed": 1.0}),
            slice=(index, len(experts)),
        )
        folders.append(_start(layout, spec, force=force))
    return folders


def trained_experts(layout: Layout, names: Sequence[str] | None = None) -> list[RunSpec]:
    """Return the specifications of finished experts, all by default; raises `UserError` if one is not finished."""
    finished = layout.finished_experts()
    if not finished:
        raise UserError("a baseline is matched to the finished experts, and there are none; train experts first")
    for name in names or ():
        if name not in finished:
            raise unknown_name("finished expert", name, finished, listed_as="this workspace has")
    return [read_run(layout.experts / name) for name in names or finished]


def _refuse_annealing(experts: Sequence[RunSpec]) -> None:
    for expert in experts:
        if expert.training.annealing is not None:
            raise UserError(
                f"expert '{expert.name}' was annealed on {', '.join(expert.training.annealing.domains)}, which a baseline on equal "
                "text cannot match; train the experts without annealing"
            )


def _all_domains(experts: list[RunSpec]) -> tuple[str, ...]:
    return tuple(sorted({domain for expert in experts for domain in expert.domains}))


def _start(layout: Layout, spec: RunSpec, *, force: bool) -> Path:
    folder = layout.baselines / spec.name
    if force or not (folder / RUN_FILE).is_file():
        write_run(layout, folder, spec, force=force)
    elif read_run(folder) != spec:
        raise UserError(f"{folder} was set up for other experts or settings; use --force to replace it")
    return folder
