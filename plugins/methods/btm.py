"""Branch-Train-Merge (arXiv:2208.03306): ensemble or weighted average of experts of one seed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...core.artefacts.files import link_or_copy
from ...core.artefacts.safetensors_io import Checkpoint, checkpoint_files
from ...core.errors import UserError
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.merging import BuiltModel, MergeInputs, MergeMethod, ModelBuilder, TensorMerge
from ...merge.dense.averages.linear import average

if TYPE_CHECKING:
    from ...merge.ensemble.model import EnsembleForCausalLM


@dataclass(frozen=True)
class EnsembleOptions:
    """Options of an ensemble."""

    posterior: Literal["prefix", "last_token"] = "prefix"
    """Evidence of the posterior: the text so far (the paper) or only its last token (the released code)."""
    prior: Literal["cached", "updating", "uniform", "given"] | None = None
    """Prior over experts. `cached`: fitted on validation text and frozen; `updating`: updated while text is
    scored; `given`: the merge's weights. Not set: `given` if the merge has weights, else `cached`."""
    top_k: int | None = None
    """Number of active experts, those with the largest prior; not set: all. With `router: cluster`, number of
    experts per token."""
    samples: int = 100
    """Number of validation blocks for fitting the cached prior or the temperature."""
    router: Literal["posterior", "cluster"] = "posterior"
    """Mixing of the experts: by domain posterior, or by distance of the text so far to their clusters."""
    clusters: str | None = None
    """Set of clusters made by `data discover`. Not set: the set that the experts' domains belong to."""
    temperature: float | None = None
    """Temperature of the `cluster` router. Not set: fitted on validation text."""
    distance: Literal["squared", "released"] = "squared"
    """Weights of the `cluster` router: `squared` is exp(-distance^2 / T), `released` exp(-distance^4 / T), as
    in the released code of Cluster-Branch-Train-Merge."""
    every: int = 8
    """Interval in tokens between weight updates of the `cluster` router."""


def build_ensemble(inputs: MergeInputs, options: EnsembleOptions, folder: Path) -> BuiltModel:
    """Write an ensemble that links the experts' files and, if needed, the seed's."""
    from ...merge.ensemble.cluster_router import routing_as_json
    from ...merge.ensemble.model import EXPERTS_FOLDER, SEED_FOLDER, ensemble_config, write_config

    if options.router == "cluster":
        from ...merge.ensemble.cluster_ensemble import cluster_router

        named = cluster_router(inputs, options)
        router = named.router
        router.write(folder)
        built = BuiltModel({}, {"clusters": named.clusters, "temperature": router.routing.temperature})
        kind, routing = "uniform", routing_as_json(router.routing)
    else:
        kind, routing, built = _prior_kind(inputs, options), None, None
    prior = _prior(inputs, options, kind)
    (folder / EXPERTS_FOLDER).mkdir()
    for name, expert in inputs.experts.items():
        link_or_copy(expert / "model.safetensors", folder / EXPERTS_FOLDER / f"{name}.safetensors")
    if _needs_seed(inputs):
        (folder / SEED_FOLDER).mkdir()
        for file in _seed_files(inputs.seed):
            link_or_copy(file, folder / SEED_FOLDER / file.name)
    values = list(prior.values())
    top_k = options.top_k if routing is None else None
    config = ensemble_config(inputs.seed, prior, values, kind, options.posterior, top_k, routing)
    write_config(folder, config)
    return built or BuiltModel(prior)


def _prior_kind(inputs: MergeInputs, options: EnsembleOptions) -> str:
    """Return the kind of prior; raises `UserError` for contradictory options."""
    kind = options.prior or ("given" if inputs.weights_given else "cached")
    if inputs.weights_given and kind != "given":
        raise UserError(f"prior '{kind}' ignores the given weights; remove either the weights or the prior")
    if options.top_k is not None:
        count = len(inputs.experts)
        if not 1 <= options.top_k <= count:
            raise UserError(f"top_k is {options.top_k}; with {count} experts it must be in the range 1 to {count}")
        if kind == "uniform" and options.top_k < count:
            raise UserError(
                "top_k selects the experts with the largest prior, which a uniform prior does not rank; "
                "use prior: cached, updating or given"
            )
    return kind


def _prior(inputs: MergeInputs, options: EnsembleOptions, kind: str) -> dict[str, float]:
    from ...merge.ensemble.prior import fit_prior

    if kind == "cached":
        return fit_prior(
            inputs.seed,
            inputs.experts,
            inputs.validation(),
            options.posterior,
            samples=options.samples,
            say=inputs.say,
        )
    if kind == "given":
        return dict(inputs.weights)
    return {name: 1 / len(inputs.experts) for name in inputs.experts}


def _needs_seed(inputs: MergeInputs) -> bool:
    """Return whether any expert lacks a tensor of the seed."""
    names = set(Checkpoint.of_folder(inputs.seed))
    return any(names - set(Checkpoint([path / "model.safetensors"])) for path in inputs.experts.values())


def _seed_files(seed: Path) -> list[Path]:
    files = checkpoint_files(seed)
    index = seed / "model.safetensors.index.json"
    return [*files, index] if len(files) > 1 else files


def ensemble_classes() -> tuple[type, type]:
    """Return the classes that `AutoConfig` and `AutoModelForCausalLM` resolve for an ensemble."""
    from ...merge.ensemble.model import EnsembleConfig, EnsembleForCausalLM

    return EnsembleConfig, EnsembleForCausalLM


def without_members(model: EnsembleForCausalLM, experts: Sequence[str], gone: Collection[str]) -> EnsembleForCausalLM:
    """Return an ensemble without some experts, prior renormalized; raises `UserError` if none is left."""
    from ...merge.ensemble.cluster_router import routing_as_json
    from ...merge.ensemble.model import EnsembleForCausalLM

    kept = [number for number, name in enumerate(model.expert_names) if name not in gone]
    prior = model.prior[kept]
    if not kept or not float(prior.sum()) > 0:
        raise UserError(f"no expert is left without {', '.join(gone)}; keep at least one")
    config = type(model.config).from_dict(model.config.to_dict())
    config.experts = [model.expert_names[number] for number in kept]
    config.prior = (prior / prior.sum()).tolist()
    if config.top_experts is not None:
        config.top_experts = min(config.top_experts, len(kept))
    router = model.router.subset(kept) if model.router is not None else None
    if router is not None:
        config.router = routing_as_json(router.routing)
    return EnsembleForCausalLM(config, [model.members[number] for number in kept], router)


@hookimpl
def merge_methods() -> list[MergeMethod]:
    return [
        TensorMerge(
            name="average",
            summary="weighted mean of the experts' tensors",
            merge=average,
            uses_seed=False,
            elementwise=True,
            arrays="any",
        ),
        ModelBuilder(
            name="ensemble",
            summary="ensemble: all experts, mixed per token by the domain posterior or by clusters",
            build=build_ensemble,
            kind="ensemble",
            options=EnsembleOptions,
            auto_classes=ensemble_classes,
            switch_off=without_members,
        ),
    ]
