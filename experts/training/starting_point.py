"""Initial state of a run: the model in float32, the optimiser state and the training blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...core.artefacts.safetensors_io import Checkpoint
from ...core.errors import UserError
from ...core.hooks.training import PrivateReleases, TrainingText
from ...core.manifests.manifest import read_manifest
from ...core.manifests.verification import require_intact
from ...core.models.loading import ExpertTensors, load_model, max_positions
from ...core.models.overlay import overlay_tensors
from ...core.text.token_store import BalancedUnion, Blocks, Concatenation, RandomSlice, SharedUnion, TokenBlocks
from ..runs.branching import parent_digests
from ..text.corpora import domain_config, prepare_domain
from .finishing import OPTIMISER_FILE
from .run_inputs import RunInputs

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
    digests = parent_digests(run.layout, run.spec.start, run.spec.base)
    for name, digest in run.spec.parents.items():
        if digests.get(name) != digest:
            raise UserError(f"'{name}' changed since '{run.spec.name}' was set up; start over with --force")
    require_intact(run.base)
    torch.manual_seed(run.spec.training.seed)
    if run.spec.kind == "generalist":
        return load_model(run.base, dtype="float32")[0]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        run.layout.seed, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    if set(run.spec.start) != {"seed"}:
        overlay_tensors(model, _average_of(run))
    return model


def _average_of(run: RunInputs) -> dict[str, Tensor]:
    """Return the weighted average of a run's initial experts, only for tensors that differ from the seed's."""
    seed = Checkpoint.of_folder(run.layout.seed)
    experts = {}
    for name in run.spec.start:
        if name != "seed":
            require_intact(run.layout.experts / name)
            experts[name] = ExpertTensors(seed, run.layout.experts / name)
    changed = sorted({name for expert in experts.values() for name in expert.changed})
    return {
        name: sum(
            weight * (seed if parent == "seed" else experts[parent]).read(name).float()
            for parent, weight in run.spec.start.items()
        )  # type: ignore[misc]  # `sum` starts with 0, so its type is int | Tensor
        for name in changed
    }


def training_text(run: RunInputs, private: PrivateReleases | None = None) -> TrainingText:
    """Return the run's text for its trainer; a private run's text is only accessible through `private`."""
    size = run.spec.training.sequence_length

    def open_domain(name: str) -> TokenBlocks:
        prepared = prepare_domain(run.layout, name, domain_config(run.project, name), run.tokenizer_folder)
        return TokenBlocks(prepared.open("train"), min(size, max_positions(run.base)))

    return TrainingText(
        {domain.name: TokenBlocks(domain.open("train"), size) for domain in run.domains},
        open_domain,
        tuple(name for name in read_manifest(run.layout.seed).domains if name in run.project.domains),
        run.base,
        private,
    )


def inherit_optimiser(run: RunInputs, loop: TrainingLoop) -> None:
    """Load the seed's optimiser state into an expert's loop, as Branch-Train-Merge does."""
    path = run.layout.seed / OPTIMISER_FILE
    if run.spec.kind == "expert" and run.spec.training.inherit_optimiser and path.is_file():
        loop.load_optimiser_state(Checkpoint([path]))


def training_blocks(run: RunInputs, shares: Mapping[str, float] | None = None) -> Blocks | BalancedUnion:
    """Return the run's training blocks; raises `UserError` for a domain with less than one block of text."""
    size = run.spec.training.sequence_length
    parts = [TokenBlocks(domain.open("train"), size) for domain in run.domains]
    for domain, blocks in zip(run.domains, parts, strict=True):
        if len(blocks) == 0:
            raise UserError(
                f"domain '{domain.name}' has {domain.train.tokens} tokens of training text, less than one block of "
                f"{size}; add text or lower training.sequence_length"
            )
    if run.spec.slice is not None:
        index, count = run.spec.slice
        return RandomSlice(Concatenation(parts), index, count, run.spec.training.seed)
    if len(parts) > 1 and shares is not None:
        return SharedUnion(parts, [shares[domain.name] for domain in run.domains])
    return BalancedUnion(parts) if len(parts) > 1 else parts[0]
