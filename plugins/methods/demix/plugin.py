"""DEMix layers (arXiv:2108.05036): one feed-forward network per domain, trained jointly with shared layers.

Trainer `demix` makes a generalist from the seed (`tune NAME --from seed --trains demix --domains a,b,c`). Its experts
share all tensors outside the feed-forward networks and are mixed by the domain posterior, as in an ensemble, without a
trained router. Trainer `demix_dapt` adds a domain: it copies the expert with the largest posterior and trains only its
feed-forward networks. `expertctl expert remove` removes an expert, but the shared layers remain trained on its text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ....core.artefacts.files import link_or_copy, read_json, write_json
from ....core.artefacts.safetensors_io import Checkpoint, stored_dtype, write_tensors
from ....core.errors import UserError
from ....core.hooks.hookspecs import hookimpl
from ....core.hooks.option_checks import check_at_least
from ....core.hooks.training import TrainablePart, Trainer, TrainingContext, TrainingText
from ....core.models.architectures import architecture_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ....merge.ensemble.model import EnsembleForCausalLM
    from .domain_feed_forwards import DomainFeedForward


@dataclass(frozen=True)
class DemixTraining:
    """Options of trainer `demix`."""

    posterior: Literal["prefix", "last_token"] = "prefix"
    """Evidence of the posterior: the whole text so far, or only its last token."""
    prior: Literal["updating", "uniform"] = "updating"
    """Prior over domains at inference."""


@dataclass(frozen=True)
class DemixAdaptation:
    """Options of trainer `demix_dapt`."""

    name: str | None = None
    """Name of the new expert. Not set: the name of the domain."""
    samples: int = 32
    """Number of blocks of the domain for finding the nearest expert."""

    def __post_init__(self) -> None:
        check_at_least("samples", self.samples, 1)


def require_dense(folder: Path, options: DemixTraining, domains: Sequence[str]) -> None:
    """Raise `UserError` unless the model is dense and there are two or more domains."""
    from ....core.manifests.manifest import find_manifest

    if len(domains) < 2:
        raise UserError("demix trains one feed-forward network per domain; name two or more domains: --domains A,B")
    manifest = find_manifest(folder)
    merged = manifest.merged if manifest is not None else None
    if merged is not None and (merged.kind in ("ensemble", "stitched") or merged.mixture is not None):
        raise UserError(
            f"demix needs a dense model, and '{folder.name}' already has several experts; start from the "
            "seed with --from seed, or add a domain to a DEMix model with --trains demix_dapt"
        )


def require_shared_layers(folder: Path, options: DemixAdaptation, domains: Sequence[str]) -> None:
    """Raise `UserError` unless the model is an ensemble whose experts share all but the FFNs.

    Also raises `UserError` for an invalid or existing name of the new expert.
    """
    from ....core.artefacts.layout import check_name
    from ....merge.ensemble.model import EXPERTS_FOLDER, SEED_FOLDER
    from ....merge.planning.assembly import split_feed_forward

    config = read_json(folder / "config.json")
    family = config.get("member", {}).get("model_type")
    if family is not None and config.get("mixer") != "posterior":
        raise UserError(
            f"demix_dapt needs an ensemble with mixer 'posterior', and '{folder.name}' has {config.get('mixer')!r}; name "
            "another model with --from"
        )
    if not (folder / SEED_FOLDER).is_dir() or family is None:
        raise UserError(
            "demix_dapt needs an ensemble whose experts share all tensors outside the feed-forward "
            f"networks, and '{folder.name}' is not one; name a DEMix model or such an ensemble with --from"
        )
    for file in sorted((folder / EXPERTS_FOLDER).glob("*.safetensors")):
        names = Checkpoint([file]).entries
        _, outside = split_feed_forward(names, architecture_of(family, names))
        if outside:
            raise UserError(
                "demix_dapt needs an ensemble whose experts share all tensors outside the feed-forward networks, and "
                f"expert '{file.stem}' of '{folder.name}' has its own {outside[0]}; name another model with --from"
            )
    if options.name is None and len(domains) > 1:
        raise UserError("demix_dapt trains one expert on all domains, which needs a name; add --option name=NAME")
    name = check_name(_expert_name(options, domains), "an expert")
    if name in config.get("experts", ()):
        raise UserError(f"'{folder.name}' already has an expert '{name}'; choose another name with --option name=NAME")


def _expert_name(options: DemixAdaptation, domains: Iterable[str]) -> str:
    return options.name if options.name is not None else next(iter(domains))


class DemixPart(TrainablePart):
    """A model whose feed-forward networks are split by domain; written as an ensemble that shares all else."""

    used_in_a_pass = "some"

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Sequence[DomainFeedForward],
        names: Sequence[str],
        options: DemixTraining,
        notes: Sequence[str] = (),
    ) -> None:
        tuning = {"trained_inside": tuple(names)}
        config = _manifest_config(names, options.prior, tuning)
        super().__init__(model, dict(model.named_parameters()), config=config, notes=notes)
        self._modules, self._names, self._options = modules, names, options

    def begin_batch(self, domains: Sequence[int]) -> None:
        from .domain_feed_forwards import set_domains

        set_domains(self._modules, domains)

    def write_model(self, folder: Path, base: Path) -> None:
        from ....core.models.stored_names import StoredNames, checkpoint_tensors
        from ....merge.ensemble.model import EXPERTS_FOLDER, SEED_FOLDER, ensemble_config, write_config
        from ....merge.ensemble.posterior_mixing import PosteriorMixer, PosteriorSettings

        shared: dict[str, Tensor] = {}
        own: dict[str, dict[str, Tensor]] = {name: {} for name in self._names}
        module = cast("PreTrainedModel", self.module)
        for key, tensor in checkpoint_tensors(module).items():
            block, separator, expert_key = key.partition(".experts.")
            number, _, parameter = expert_key.partition(".")
            if separator:
                own[self._names[int(number)]][f"{block}.{parameter}"] = tensor
            else:
                shared[key] = tensor
        for subfolder in (EXPERTS_FOLDER, SEED_FOLDER):
            (folder / subfolder).mkdir(exist_ok=True)
        dtype, stored = stored_dtype(base), StoredNames.of_folder(base)
        shared = stored.to_stored(shared, lambda group: {})
        _write_tensors(folder / SEED_FOLDER / "model.safetensors", shared, dtype)
        for name, tensors in own.items():
            tensors = stored.to_stored(tensors, lambda group: {})
            _write_tensors(folder / EXPERTS_FOLDER / f"{name}.safetensors", tensors, dtype)
        prior, options = (1 / len(own),) * len(own), self._options
        mixer = PosteriorMixer(PosteriorSettings(prior, options.prior, options.posterior))
        write_config(folder, ensemble_config(read_json(base / "config.json"), own, "posterior", mixer))


def prepare(context: TrainingContext) -> TrainablePart:
    """Split the feed-forward networks by domain and make all parameters trainable.

    Blocks are drawn from the domains in turn, so that all have the same number of tokens: in every step or,
    if a step has fewer blocks than there are domains or not a multiple, in every few steps. A network without tokens in a
    step has no gradient, and the optimiser leaves it as it is.
    """
    from .domain_feed_forwards import split_by_domain

    names = tuple(context.text.domains)
    modules = split_by_domain(context.model, len(names))
    context.model.requires_grad_(True)
    notes = _cycle_notes(len(names), context.blocks_per_step)
    return DemixPart(context.model, modules, names, context.options, notes)


def _cycle_notes(num_domains: int, blocks_per_step: int | None) -> tuple[str, ...]:
    """Return a note if a step has too few blocks to train the feed-forward networks of all domains."""
    if blocks_per_step is None or blocks_per_step >= num_domains:
        return ()
    return (
        f"a step has {blocks_per_step} blocks, and there are {num_domains} domains: each feed-forward network is trained "
        f"in {blocks_per_step} of {num_domains} steps, the shared layers in all; to train all in every step, set "
        f"training.batch_size or training.accumulation so that a step has {num_domains} blocks",
    )


def _manifest_config(names: Sequence[str], prior: str, tuning: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "method": "ensemble",
        "kind": "ensemble",
        "weights": {name: 1 / len(names) for name in names},
        "experts": tuple(names),
        "options": {"prior": prior},
        "tuning": tuning,
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    write_tensors(path, {key: tensor.detach().to("cpu", dtype) for key, tensor in tensors.items()})


class AdaptedPart(TrainablePart):
    """The feed-forward networks of a copied expert; written as the ensemble with one more expert."""

    def __init__(
        self, member: PreTrainedModel, parameters: Mapping[str, nn.Parameter], name: str, config: Mapping[str, Any]
    ) -> None:
        super().__init__(member, parameters, config=config)
        self._name = name

    def write_model(self, folder: Path, base: Path) -> None:
        """Write the new expert's tensors and the configuration, and link all other files from `base`."""
        from ....merge.ensemble.model import EXPERTS_FOLDER, SEED_FOLDER

        for subfolder in (EXPERTS_FOLDER, SEED_FOLDER):
            (folder / subfolder).mkdir(exist_ok=True)
            for file in sorted((base / subfolder).iterdir()):
                link_or_copy(file, folder / subfolder / file.name)
        path = folder / EXPERTS_FOLDER / f"{self._name}.safetensors"
        _write_tensors(path, self._as_in_files(base), stored_dtype(base / SEED_FOLDER))
        config = read_json(base / "config.json")
        experts, settings = config["experts"], config["mixer_settings"]
        count = len(experts) + 1
        # the new expert gets the mean prior, which is uninformative
        prior = [*(share * (count - 1) / count for share in settings["prior"]), 1 / count]
        changed = {"experts": [*experts, self._name], "mixer_settings": {**settings, "prior": prior}}
        write_json(folder / "config.json", {**config, **changed})

    def _as_in_files(self, base: Path) -> Mapping[str, Tensor]:
        """Return the trained tensors by the names that the files of the ensemble have for them."""
        from ....core.models.stored_names import StoredNames, stored_tensors

        member = cast("PreTrainedModel", self.module)
        present = {name for file in base.glob("*/*.safetensors") for name in Checkpoint([file])}
        names = StoredNames(member)
        trained = {*self.parameters, *(stored for name in self.parameters for stored in names.of(name))}
        return {name: tensor for name, tensor in stored_tensors(member, present).items() if name in trained}


def prepare_adaptation(context: TrainingContext) -> TrainablePart:
    """Copy the expert nearest to the new domain and make only its feed-forward networks trainable."""
    import copy

    from ....core.models.feed_forwards import feed_forwards

    model = cast("EnsembleForCausalLM", context.model)
    options: DemixAdaptation = context.options
    name = _expert_name(options, context.text.domains)
    nearest = nearest_expert(model, context.text, options.samples)
    member = copy.deepcopy(model.members[nearest])
    member.requires_grad_(False)
    parameters = {}
    for part in feed_forwards(member):
        for key, parameter in part.module.named_parameters():
            parameter.requires_grad_(True)
            parameters[f"{part.name}.{key}"] = parameter
    tuning = {"trained_inside": (name,), "copied_from": {name: model.expert_names[nearest]}}
    config = _manifest_config((*model.expert_names, name), model.config.mixer_settings["prior_kind"], tuning)
    return AdaptedPart(member, parameters, name, config)


def nearest_expert(model: EnsembleForCausalLM, text: TrainingText, samples: int) -> int:
    """Return the index of the expert with the largest posterior on a sample of the run's text."""
    import torch

    from ....core.models.feed_forwards import spread_blocks
    from ....core.models.kernels.posterior import mean_posterior
    from ....core.models.scoring import token_log_probs

    uniform = torch.full((len(model.members),), 1 / len(model.members)).log()
    total = torch.zeros(len(model.members))
    with torch.inference_mode():
        for blocks in text.domains.values():
            for block in spread_blocks(blocks, samples):
                tokens = torch.from_numpy(block[None])
                scores = torch.stack([token_log_probs(member, tokens) for member in model.members])
                total += mean_posterior(scores, uniform, "prefix")
    return int(total.argmax())


@hookimpl
def trainers() -> list[Trainer]:
    return [
        Trainer(
            "demix",
            "one feed-forward network per domain, trained jointly with shared layers",
            prepare,
            DemixTraining,
            uses_text=True,
            makes="generalist",
            require=require_dense,
        ),
        Trainer(
            "demix_dapt",
            "feed-forward networks of a new domain in a DEMix model, starting from the nearest expert",
            prepare_adaptation,
            DemixAdaptation,
            uses_text=True,
            makes="generalist",
            require=require_shared_layers,
        ),
    ]
