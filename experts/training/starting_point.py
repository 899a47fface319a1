"""Initial state of a run: the model in float32, the optimiser state and the training blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...core.artefacts.safetensors_io import Checkpoint
from ...core.errors import UserError
from ...core.hooks.steps import ObjectiveContext, TrainingObjective
from ...core.hooks.training import PrivateReleases, TrainingText
from ...core.manifests.manifest import read_manifest
from ...core.manifests.run import STATE_FOLDER, RunSpec
from ...core.manifests.verification import require_intact
from ...core.models.loading import (
    ExpertTensors,
    load_model,
    load_network,
    max_positions,
    require_intact_models,
)
from ...core.models.outline import Outline, outline_of
from ...core.models.overlay import overlay_tensors
from ...core.text.block_order import BalancedUnion, Concatenation, RandomSlice, SharedUnion
from ...core.text.conversation_blocks import blocks_of
from ...core.text.token_store import Blocks, TokenBlocks
from ..runs.branching import parent_digests
from ..runs.trainable import chosen_objective, models_read
from ..text.corpora import PreparedDomain, domain_config, prepare_domain
from ..text.run_text import require_run_text
from .distributed.ranks import Ranks
from .finishing import OPTIMISER_FILE
from .run_inputs import RunInputs
from .steps.block_stream import ANNEALING_SEED, BlockStream

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .steps.loop import TrainingLoop


def starting_model(run: RunInputs) -> PreTrainedModel:
    """Return the model to train in float32: a new model, the base, or an average of experts.

    Raises `UserError` if a parent model changed since the run was set up.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if run.spec.kind == "seed":
        torch.manual_seed(run.spec.training.seed)
        config = AutoConfig.from_pretrained(run.folder, local_files_only=True, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _require_parents(run)
    require_intact(run.base)
    torch.manual_seed(run.spec.training.seed)
    if run.spec.kind == "generalist":
        return load_model(run.base, dtype="float32")[0]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        run.layout.seed, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    average = _Average.of(run)
    if average is not None:
        overlay_tensors(model, {name: average.read(name) for name in average.changed})
    return model


def starting_outline(run: RunInputs, ranks: Ranks) -> Outline | None:
    """Return the model to train without its weights, for processes that read a part of them each; None if it has to be loaded.

    The main process verifies the files. Raises `UserError` as `starting_model`.
    """
    import torch

    if run.spec.kind == "seed":
        return None
    _require_parents(run)
    with ranks.main_first():
        require_intact(run.base, tensors=ranks.is_main)
        average = _Average.of(run, tensors=ranks.is_main)
    torch.manual_seed(run.spec.training.seed)
    return outline_of(run.base) if average is None else outline_of(run.base, average, average.changed)


def _require_parents(run: RunInputs) -> None:
    """Raise `UserError` if a parent model is not the one that the run was set up with."""
    others = models_read(run.spec.trains, run.spec.options, run.spec.training)
    digests = parent_digests(run.layout, run.spec.start, run.spec.base, others)
    for name, digest in run.spec.parents.items():
        if digests.get(name) != digest:
            raise UserError(f"'{name}' changed since '{run.spec.name}' was set up; start over with --force")


class _Average:
    """The weighted average of a run's initial experts, for tensors that differ from the seed's."""

    def __init__(self, weighted: Sequence[tuple[float, Checkpoint | ExpertTensors]], changed: frozenset[str]) -> None:
        self._weighted, self.changed = weighted, changed

    @classmethod
    def of(cls, run: RunInputs, *, tensors: bool = True) -> _Average | None:
        """Return the average, None for a run that starts from the seed or a generalist; `tensors` as in `require_intact`."""
        if run.spec.kind == "generalist" or set(run.spec.start) == {"seed"}:
            return None
        seed = Checkpoint.of_folder(run.layout.seed)
        parents: dict[str, Checkpoint | ExpertTensors] = {"seed": seed}
        changed: set[str] = set()
        for name in run.spec.start:
            if name != "seed":
                require_intact(run.layout.experts / name, tensors=tensors)
                parents[name] = expert = ExpertTensors(seed, run.layout.experts / name)
                changed |= set(expert.changed)
        return cls([(weight, parents[name]) for name, weight in run.spec.start.items()], frozenset(changed))

    def read(self, name: str) -> Tensor:
        """Return one tensor in float32."""
        total: Tensor = sum(weight * parent.read(name).float() for weight, parent in self._weighted)  # type: ignore[assignment]  # `sum` starts with 0
        return total

    def span(self, name: str, begin: int, end: int) -> Tensor:
        """Return the elements `begin` to `end` of one tensor in row-major order, shape (end - begin,)."""
        total: Tensor = sum(weight * parent.span(name, begin, end).float() for weight, parent in self._weighted)  # type: ignore[assignment]  # as above
        return total


def training_text(run: RunInputs, private: PrivateReleases | None = None) -> TrainingText:
    """Return the run's text for its trainer; a private run's text is only accessible through `private`."""
    size = run.spec.training.sequence_length

    def open_domain(name: str) -> TokenBlocks:
        prepared = prepare_domain(run.layout, name, domain_config(run.project, name), run.tokenizer_folder)
        return blocks_of(prepared.open("train"), min(size, max_positions(run.base)))

    return TrainingText(
        {domain.name: blocks_of(domain.open("train"), size) for domain in run.domains},
        open_domain,
        tuple(name for name in read_manifest(run.layout.seed).domains if name in run.project.domains),
        run.base,
        private,
    )


def inherit_optimiser(run: RunInputs, loop: TrainingLoop) -> None:
    """Load the seed's optimiser state into an expert's loop, as Branch-Train-Merge does."""
    path = run.layout.seed / OPTIMISER_FILE
    if run.spec.kind != "expert" or not run.spec.training.inherit_optimiser or not path.is_file():
        return
    settings = read_manifest(run.layout.seed).config
    if isinstance(settings, RunSpec) and settings.training.optimiser == run.spec.training.optimiser:
        loop.load_optimiser_state(Checkpoint([path]))


def prepared_objective(run: RunInputs, model: PreTrainedModel, rank: int = 0) -> TrainingObjective:
    """Return the run's objective; raises `UserError` if it cannot train this model."""
    objective, options = chosen_objective(run.spec.training)

    def open_model(name: str) -> PreTrainedModel:
        folder = run.layout.artefact(name)
        require_intact_models([folder])
        return load_network(folder, dtype="float32")

    cache = run.folder / STATE_FOLDER / "objective" / f"{rank}"
    context = ObjectiveContext(model, lambda: starting_model(run), run.tokenizer_folder, options, open_model, cache)
    return objective.prepare(context)


def training_blocks(run: RunInputs, shares: Mapping[str, float] | None = None) -> Blocks | BalancedUnion:
    """Return the run's training blocks; raises `UserError` for a domain with less than one block of text."""
    require_run_text(run.project, run.spec.domains, run.spec.training)  # formats may have changed since it was set up
    parts = _blocks_by_domain(run, run.domains)
    if run.spec.slice is not None:
        index, count = run.spec.slice
        return RandomSlice(Concatenation(parts), index, count, run.spec.training.seed)
    if len(parts) > 1 and shares is not None:
        return SharedUnion(parts, [shares[domain.name] for domain in run.domains])
    return BalancedUnion(parts) if len(parts) > 1 else parts[0]


def annealing_blocks(run: RunInputs) -> BlockStream | None:
    """Return the blocks of a run's annealing; raises `UserError` as `training_blocks`. None for a run without."""
    annealing = run.spec.training.annealing
    if annealing is None:
        return None
    parts = _blocks_by_domain(run, run.annealing)
    names = [domain.name for domain in run.all_domains]
    numbers = [names.index(domain.name) for domain in run.annealing]
    shares = [annealing.domains[domain.name] for domain in run.annealing]
    blocks = SharedUnion(parts, shares) if len(parts) > 1 else parts[0]
    return BlockStream(blocks, run.spec.training.seed + ANNEALING_SEED, numbers)


def _blocks_by_domain(run: RunInputs, domains: Sequence[PreparedDomain]) -> list[TokenBlocks]:
    size, packed = run.spec.training.sequence_length, run.spec.training.pack_conversations
    parts = [blocks_of(domain.open("train"), size, packed=packed) for domain in domains]
    for domain, blocks in zip(domains, parts, strict=True):
        if len(blocks) == 0 and blocks.store.part.has_pairs:
            raise UserError(
                f"every pair of domain '{domain.name}' is longer than a block of {size} tokens; raise training.sequence_length"
            )
        if len(blocks) == 0 and blocks.store.has_conversations:
            raise UserError(f"no token of domain '{domain.name}' counts; set its counts to all, or add text")
        if len(blocks) == 0:
            raise UserError(
                f"domain '{domain.name}' has {domain.train.tokens} tokens of training text, less than one block of "
                f"{size}; add text or lower training.sequence_length"
            )
    return parts
