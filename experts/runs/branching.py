"""Branching: setting up an expert's run from the seed, given experts, or the experts nearest to its domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ...core.artefacts.digests import digest_of_tokenizer
from ...core.artefacts.files import exclusive, new_folder, read_json, refuse_existing
from ...core.artefacts.layout import Layout, check_name, require_free
from ...core.artefacts.versions import require_privacy_extra
from ...core.config.settings import ExpertConfig, ProjectConfig, TrainingConfig
from ...core.errors import UserError, unknown_name
from ...core.hooks.options import parse_options
from ...core.hooks.training import Trainer
from ...core.manifests.manifest import read_manifest
from ...core.manifests.run import RunSpec, is_finished
from ...core.models.adapters.prompts import is_prompt, refuse_prompt
from ...core.models.loading import load_network, max_positions, require_intact_models, seed_of, tokenizer_folder
from ...core.process.compute import best_device
from ...core.text.conversation_blocks import blocks_of
from ...core.text.token_store import spread
from ..text.corpora import domain_config, prepare_domain
from ..text.run_text import require_run_text
from .jobs.status import require_no_job
from .replaced import back_up
from .trainable import (
    models_read,
    require_changeable,
    require_steps,
    require_whole_parameters,
    trainer_for,
)

AUTO_SAMPLE_BLOCKS = 32


def branch(layout: Layout, project: ProjectConfig, name: str, expert: ExpertConfig, *, force: bool = False) -> RunSpec:
    """Set up the run of a new expert in `experts/NAME` and return its specification.

    Raises `UserError` if the seed is missing, a name is unknown, or the expert exists.
    """
    check_name(name, "an expert")
    folder = layout.experts / name
    require_free(layout, name, folder)
    refuse_existing(folder, force=force, what="expert")
    if not is_finished(layout.seed):
        raise UserError("there is no finished seed; create one with `expertctl seed`")
    domain_config(project, expert.domain)
    trainer = trainer_for(expert.trains)
    if trainer.makes == "generalist":
        raise UserError(
            f"trainer '{trainer.name}' trains a whole {trainer.makes}; use it with `expertctl tune NAME --trains "
            f"{trainer.name}`"
        )
    options = parse_options(trainer.options, expert.options, f"trainer '{trainer.name}'")
    model_type = str(read_json(layout.seed / "config.json").get("model_type"))
    names = sorted(read_manifest(layout.seed).tensors)
    require_changeable(expert.trains, names, model_type)
    require_whole_parameters(expert.trains, layout.seed, names)
    if trainer.require is not None:
        trainer.require(layout.seed, options, (expert.domain,))
    training = expert_training(layout, project, expert.training)
    require_steps(training, layout.seed)
    require_run_text(project, [expert.domain], training)
    check_private(expert, training, trainer)
    start = start_weights(layout, project, expert)
    if trainer.makes == "adapter" and set(start) != {"seed"}:
        raise UserError(
            f"trainer '{trainer.name}' makes an adapter of the seed, so it cannot start from experts ({', '.join(start)}); "
            "use --from seed, or train another part"
        )
    require_room(layout, training, trainer.context_tokens(layout.seed, options) if trainer.context_tokens else 0)
    read = models_read(expert.trains, expert.options, training)
    if name in read:
        raise UserError(f"'{name}' cannot be trained from itself; name other models, or the new expert differently")
    spec = RunSpec(
        kind="expert",
        name=name,
        domains=(expert.domain,),
        training=training,
        trains=expert.trains,
        options=expert.options,
        start=start,
        parents=parent_digests(layout, start, others=read),
        owner=expert.owner,
        licence=expert.licence,
        dp=expert.dp,
    )
    write_run(layout, folder, spec, force=force)
    return spec


def require_room(layout: Layout, training: TrainingConfig, prompt: int) -> None:
    """Raise `UserError` for blocks that do not fit into the seed's context behind a prompt, which keeps no documents apart."""
    positions = max_positions(layout.seed)
    if training.sequence_length + prompt > positions:
        left = (
            f", of which the prompt takes {prompt}; lower it to at most {positions - prompt}"
            if prompt
            else "; lower it"
        )
        raise UserError(
            f"training.sequence_length {training.sequence_length} exceeds the seed's {positions} positions{left}"
        )
    for setting in ("separate_documents", "pack_conversations"):
        if prompt and getattr(training, setting):
            raise UserError(
                f"training.{setting} gives a document its own attention, without the prompt before it; set it to false"
            )


def require_opacus() -> None:
    """Raise `UserError` if Opacus is not installed."""
    require_privacy_extra("opacus", "differential privacy needs Opacus")


def check_private(expert: ExpertConfig, training: TrainingConfig, trainer: Trainer) -> None:
    """Raise `UserError` for settings that leak private text without noise or do not work with DP-SGD."""
    if expert.dp is None:
        return
    require_opacus()
    if expert.from_ == "auto":
        raise UserError(
            "`from: auto` computes weights from the private text and writes them to the manifest; with differential "
            "privacy start from the seed, or give weights"
        )
    if trainer.uses_text and not trainer.private_text:
        raise UserError(
            f"trainer '{trainer.name}' reads the text before training and does not declare that it does so privately; "
            "use another trainer, or train without differential privacy"
        )
    for setting in ("compile", "activation_checkpointing", "chunked_loss", "separate_documents"):
        if getattr(training, setting):
            raise UserError(f"training.{setting} does not work with differential privacy; set {setting}: false")
    if training.stages:
        raise UserError(
            "training.stages do not work with differential privacy, whose unit is a whole block; leave them out"
        )
    if training.annealing is not None:
        raise UserError(
            "training.annealing does not work with differential privacy, which counts the blocks of one domain; leave it out"
        )
    if training.objective != TrainingConfig().objective:
        raise UserError(f"training.objective: {training.objective} does not work with differential privacy")
    if training.spike_deviations is not None:
        raise UserError(
            "training.spike_deviations takes steps back whose privacy is spent, and would draw their noise again; with "
            "differential privacy set it to null"
        )
    if training.precision in ("bfloat16", "pure_bfloat16"):
        raise UserError("differential privacy requires float32 gradients for exact clipping; set precision: auto")


def write_run(layout: Layout, folder: Path, spec: RunSpec, *, force: bool = False) -> None:
    """Create the folder of a run atomically; a generalist that it replaces is kept until the new run trains.

    Raises `UserError` if a process or a job trains the run that it replaces.
    """
    require_no_job(folder)
    with exclusive(layout.lock(f"run-{folder.name}"), f"{spec.kind} '{spec.name}'"):
        if force and spec.kind == "generalist":
            back_up(folder)
        with new_folder(folder, force=force, what=spec.kind) as partial:
            spec.write(partial)


def parent_digests(
    layout: Layout, start: Mapping[str, float], base: str | None = None, others: Iterable[str] = ()
) -> dict[str, str]:
    """Return the digests of the seed, of the experts or the generalist that a run starts from, and of others that it reads.

    Raises `UserError` for an expert of another seed, and for others with another tokenizer than what the run starts from.
    """
    models = {"seed": layout.seed}
    if base not in (None, "seed"):
        models[base] = layout.artefact(base)
    digests = {}
    for name, folder in models.items():
        manifest = read_manifest(folder)
        digests[name] = manifest.digest
        if "config.json" in manifest.files:  # RoPE, top-k or gating settings can differ for the same tensors
            digests[f"{name}/config.json"] = manifest.files["config.json"]
    for name in start:
        if name != "seed":
            manifest = read_manifest(layout.experts / name)
            seed_of(layout.experts / name, manifest, layout.seed)
            digests[name] = manifest.digest
    tokenizer = digest_of_tokenizer(list(models.values())[-1])
    for name in others:
        folder = layout.artefact(name)
        if digest_of_tokenizer(tokenizer_folder(folder)) != tokenizer:
            raise UserError(
                f"'{name}' has another tokenizer; its predictions are of use only to models with the same one"
            )
        digests[name] = read_manifest(folder).digest
    return digests


def expert_training(layout: Layout, project: ProjectConfig, own: TrainingConfig) -> TrainingConfig:
    """Return an expert's training settings; its schedule continues where the seed's ended, if not set."""
    training = project.training_of(own)
    if training.schedule_begin is not None:
        return training
    pretraining = read_manifest(layout.seed).run
    seed_end = pretraining.training.schedule_end if pretraining is not None else 0.0
    begin = seed_end if seed_end < training.schedule_end else 0.0
    return training.model_copy(update={"schedule_begin": begin})


def start_weights(layout: Layout, project: ProjectConfig, expert: ExpertConfig) -> dict[str, float]:
    """Return an expert's initial weights over `seed` and finished experts, which sum to 1.

    Raises `UserError` for an unknown name, a negative weight, or a sum of 0.
    """
    source = expert.from_
    if source == "seed":
        return {"seed": 1.0}
    finished = layout.finished_experts()
    if source == "auto":
        finished = [name for name in finished if not is_prompt(layout.experts / name)]
        if not finished:
            return {"seed": 1.0}  # the first branch is a copy of the seed
        return nearest_experts(layout, project, expert.domain, finished)
    weights: Mapping[str, float] = {source: 1.0} if isinstance(source, str) else source
    for name, weight in weights.items():
        if name != "seed" and name not in finished:
            raise unknown_name("finished expert", name, ["seed", *finished])
        if name != "seed":
            refuse_prompt(layout.experts / name, "--from")
        if weight < 0:
            raise UserError(f"the weight of '{name}' is {weight}; weights must not be negative")
    total = sum(weights.values())
    if total <= 0:
        raise UserError("the initial weights sum to 0; give at least one positive weight")
    return {name: weight / total for name, weight in weights.items()}


def nearest_experts(layout: Layout, project: ProjectConfig, domain: str, experts: list[str]) -> dict[str, float]:
    """Return the posterior probability of each expert's domain on a sample of a new domain's training text.

    Branch-Train-Merge initialises a new branch with the average of the experts, weighted by p(D = j | sample)
    (arXiv:2208.03306, section 3.1).
    """
    import torch

    from ...core.models.kernels.posterior import mean_posterior
    from ...core.models.scoring import token_log_probs

    prepared = prepare_domain(layout, domain, domain_config(project, domain), layout.seed)
    blocks = blocks_of(prepared.open("train"), min(project.training.sequence_length, max_positions(layout.seed)))
    sample = [torch.from_numpy(block[None]) for block in spread(blocks, AUTO_SAMPLE_BLOCKS)]
    require_intact_models(layout.experts / name for name in experts)
    scores = []
    for name in experts:
        model = load_network(layout.experts / name, dtype="float32", as_trained=False).to(best_device())
        with torch.inference_mode():
            scores.append([token_log_probs(model, tokens_1T1.to(model.device)).cpu() for tokens_1T1 in sample])
        del model
    uniform = torch.full((len(experts),), 1 / len(experts)).log()
    block_scores = [torch.stack(by_expert) for by_expert in zip(*scores, strict=True)]
    posterior = torch.stack([mean_posterior(block, uniform, "prefix") for block in block_scores]).mean(dim=0)
    return {name: float(weight) for name, weight in zip(experts, posterior, strict=True)}
