"""DEMix layers (arXiv:2108.05036): a feed-forward for each domain, trained jointly over shared layers.

Trainer `demix` makes a generalist from the seed (`tune NAME --from seed --trains demix --domains a,b,c`). Its experts share all
but their feed-forwards, and are mixed by the domain posterior as an ensemble's are: no router has parameters. Trainer
`demix_dapt` adds a domain later: the expert that the posterior finds nearest is copied, and its feed-forward alone trains.
Experts leave with `expertctl expert remove`; the shared layers have seen their text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ....core.artefacts.files import link_or_copy, read_json
from ....core.errors import UserError
from ....core.hooks.hookspecs import hookimpl
from ....core.hooks.option_checks import check_at_least
from ....core.hooks.text import TrainingText
from ....core.hooks.training import TrainablePart, Trainer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ....merge.ensemble.model import EnsembleForCausalLM


@dataclass(frozen=True)
class DemixTraining:
    """How domain feed-forwards train jointly, and how they are mixed afterwards."""

    posterior: Literal["prefix", "last_token"] = "prefix"
    prior: Literal["updating", "uniform"] = "updating"
    """Of the domains, when the model is used."""


@dataclass(frozen=True)
class DemixAdaptation:
    """How a domain joins a DEMix model."""

    name: str | None = None
    """What its expert is called. Not set: as the domain."""
    samples: int = 32
    """Blocks of the domain by which the nearest expert is found."""

    def __post_init__(self) -> None:
        check_at_least("samples", self.samples, 1)


def require_dense(folder: Path, options: DemixTraining, domains: Sequence[str]) -> None:
    """Raise `UserError` for a generalist that is no dense model, and for fewer than two domains."""
    from ....core.artefacts.lineage import manifest_path, read_manifest

    if len(domains) < 2:
        raise UserError(
            "demix trains a feed-forward for each domain; name two domains or more: --domains A,B"
        )
    config = read_manifest(folder).config if manifest_path(folder) is not None else {}
    if config.get("kind") in ("ensemble", "stitched") or "router" in (config.get("mixture") or {}):
        raise UserError(
            f"demix divides the feed-forwards of a dense model, and '{folder.name}' has several already; begin with the seed: "
            "--from seed, or add a domain to a DEMix model: --trains demix_dapt"
        )


def require_shared_rest(folder: Path, options: DemixAdaptation, domains: Sequence[str]) -> None:
    """Raise `UserError` for a generalist that is no ensemble of experts which share all but their feed-forwards.

    And for a name that the new expert cannot have.
    """
    from ....core.artefacts.layout import check_name
    from ....core.artefacts.safetensors_io import Checkpoint
    from ....core.hooks.manager import installed_plugins
    from ....merge.ensemble.model import EXPERTS_FOLDER, SEED_FOLDER
    from ....merge.planning.assembly import split_feed_forward

    config = read_json(folder / "config.json")
    family = config.get("member", {}).get("model_type")
    if not (folder / SEED_FOLDER).is_dir() or family is None:
        raise UserError(
            f"demix_dapt adds a domain to a model whose experts share all but their feed-forwards, and '{folder.name}' is "
            "none; name a DEMix model, or an ensemble of such experts, with --from"
        )
    for file in sorted((folder / EXPERTS_FOLDER).glob("*.safetensors")):
        _, other = split_feed_forward(Checkpoint([file]).entries, installed_plugins().architecture_of(family))
        if other:
            raise UserError(
                f"demix_dapt adds a domain to a model whose experts share all but their feed-forwards, and expert '{file.stem}' of "
                f"'{folder.name}' has its own {other[0]}; name another with --from"
            )
    if options.name is None and len(domains) > 1:
        raise UserError(
            "one expert is trained, on all domains together; say what it is called: --option name=NAME"
        )
    name = check_name(_name(options, domains), "an expert")
    if name in config.get("experts", ()):
        raise UserError(
            f"the model has an expert '{name}' already; call the new one otherwise: --option name=NAME"
        )


def _name(options: DemixAdaptation, domains: Iterable[str]) -> str:
    return options.name if options.name is not None else next(iter(domains))


def prepare(model: PreTrainedModel, options: DemixTraining, text: TrainingText) -> TrainablePart:
    """Give each domain its own feed-forwards and train everything."""
    from .domain_feed_forwards import choose, divide

    names = tuple(text.domains)
    parts = divide(model, len(names))
    model.requires_grad_(True)

    def finish(folder: Path) -> None:
        shared, own = _sorted_tensors(model, names)
        _write(folder, text.folder, shared, own, options)

    return TrainablePart(
        model,
        dict(model.named_parameters()),
        tell_domains=lambda domains: choose(parts, domains),
        finish=finish,
        config={**_described(names, options.prior), "tuning": {"made": list(names)}},
    )


def _described(names: Sequence[str], prior: str) -> dict[str, Any]:
    return {
        "method": "ensemble",
        "kind": "ensemble",
        "weights": {name: 1 / len(names) for name in names},
        "mixture": {"experts": list(names)},
        "options": {"prior": prior},
    }


def _sorted_tensors(
    model: PreTrainedModel, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return (shared tensors, each domain's own), by the seed's names."""
    from ....core.models.loading import checkpoint_tensors

    shared: dict[str, Tensor] = {}
    own: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, tensor in checkpoint_tensors(model).items():
        before, marked, after = key.partition(".experts.")
        if not marked:
            shared[key] = tensor
            continue
        number, _, rest = after.partition(".")
        own[names[int(number)]][f"{before}.{rest}"] = tensor
    return shared, own


def _write(
    folder: Path,
    seed: Path,
    shared: Mapping[str, Tensor],
    own: Mapping[str, Mapping[str, Tensor]],
    options: DemixTraining,
) -> None:
    """Write the model as an ensemble whose experts share all but their feed-forwards."""
    from ....core.artefacts.safetensors_io import write_tensors
    from ....experts.training.tuned_model import stored_dtype
    from ....merge.ensemble.model import EXPERTS_FOLDER, SEED_FOLDER, ensemble_config, write_config

    dtype = stored_dtype(seed)
    for place in (EXPERTS_FOLDER, SEED_FOLDER):
        (folder / place).mkdir(exist_ok=True)
    write_tensors(
        folder / SEED_FOLDER / "model.safetensors", {key: one.to("cpu", dtype) for key, one in shared.items()}
    )
    for name, tensors in own.items():
        cast = {key: tensor.to("cpu", dtype) for key, tensor in tensors.items()}
        write_tensors(folder / EXPERTS_FOLDER / f"{name}.safetensors", cast)
    prior = [1 / len(own)] * len(own)
    write_config(folder, ensemble_config(seed, own, prior, options.prior, options.posterior, None))


def prepare_adaptation(
    model: EnsembleForCausalLM, options: DemixAdaptation, text: TrainingText
) -> TrainablePart:
    """Copy the expert that is nearest to the new domain and train its feed-forwards alone."""
    import copy

    from ....core.models.feed_forwards import feed_forwards

    name = _name(options, text.domains)
    nearest = nearest_expert(model, text, options.samples)
    member = copy.deepcopy(model.members[nearest])
    member.requires_grad_(False)
    parameters = {}
    for part in feed_forwards(member):
        for key, parameter in part.module.named_parameters():
            parameter.requires_grad_(True)
            parameters[f"{part.name}.{key}"] = parameter

    def finish(folder: Path) -> None:
        _write_joined(folder, text.folder, name, {key: one.detach() for key, one in parameters.items()})

    names = (*model.expert_names, name)
    described = _described(names, model.config.prior_kind)
    described["tuning"] = {"made": [name], "began_as": {name: model.expert_names[nearest]}}
    return TrainablePart(member, parameters, finish=finish, config=described)


def nearest_expert(model: EnsembleForCausalLM, text: TrainingText, samples: int) -> int:
    """Return the number of the expert with the largest posterior on a sample of the run's text."""
    import torch

    from ....core.models.feed_forwards import spread_blocks
    from ....core.models.posterior import mean_posterior
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


def _write_joined(folder: Path, base: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write an ensemble with one more expert: all other files are the base's own."""
    from ....core.artefacts.files import write_json
    from ....core.artefacts.safetensors_io import write_tensors
    from ....experts.training.tuned_model import stored_dtype
    from ....merge.ensemble.model import EXPERTS_FOLDER, SEED_FOLDER

    for place in (EXPERTS_FOLDER, SEED_FOLDER):
        (folder / place).mkdir(exist_ok=True)
        for file in sorted((base / place).iterdir()):
            link_or_copy(file, folder / place / file.name)
    dtype = stored_dtype(base / SEED_FOLDER)
    cast = {key: tensor.to("cpu", dtype) for key, tensor in tensors.items()}
    write_tensors(folder / EXPERTS_FOLDER / f"{name}.safetensors", cast)
    config = read_json(base / "config.json")
    count = len(config["experts"]) + 1
    # the newcomer gets the mean of the others' prior, which says nothing about it
    prior = [share * (count - 1) / count for share in config["prior"]]
    write_json(
        folder / "config.json",
        {**config, "experts": [*config["experts"], name], "prior": [*prior, 1 / count]},
    )


@hookimpl
def trainers() -> list[Trainer]:
    return [
        Trainer(
            "demix",
            "a feed-forward for each domain over shared layers, all trained jointly",
            prepare,
            DemixTraining,
            uses_text=True,
            makes="generalist",
            require=require_dense,
        ),
        Trainer(
            "demix_dapt",
            "one more domain's feed-forward for a DEMix model, from its nearest expert",
            prepare_adaptation,
            DemixAdaptation,
            uses_text=True,
            makes="generalist",
            require=require_shared_rest,
        ),
    ]
