"""Reads mergekit-moe configuration files as mixture recipes: experts, prompts and gate modes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from ...core.config.problems import first_problem
from ...core.config.settings import Section
from ...core.errors import UserError, unknown_name
from .mergekit_models import NamedModels
from .perturbation import NOISE, RESIDUAL
from .recipe import OutputSlice, Recipe, SourceSlice

GATES: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "hidden": ("prompt_states", {}),
    "hidden_last": ("prompt_states", {}),
    "hidden_avg": ("prompt_states", {"average": 1}),
    "cheap_embed": ("prompt_tokens", {}),
    "random": ("random", {"deviation": 1.0}),
    "uniform_random": ("linear", {}),
}
"""mergekit-moe gate mode -> (router initialisation, its options)."""
ARCHITECTURES = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
_FROM_PROMPTS = ("prompt_states", "prompt_tokens")
_SEED = "base"


class _Expert(Section):
    source_model: Any
    positive_prompts: tuple[str, ...] | None = None
    negative_prompts: tuple[str, ...] | None = None
    noise_scale: float | None = Field(default=None, ge=0)
    residual_scale: float | None = None


class _MoeFile(Section):
    base_model: Any
    experts: tuple[_Expert, ...] = Field(min_length=1)
    gate_mode: str = "hidden"
    dtype: str | None = None
    experts_per_token: int | None = Field(default=None, ge=1)
    """None: 2, or the number of experts if that is smaller."""
    shared_experts: tuple[_Expert, ...] | None = None
    architecture: str | None = None
    tokenizer_source: Literal["base", "union"] | None = None
    name: str | None = None
    """Name of the result in files of several documents."""


def read_mergekit_moe(content: Mapping[str, Any], named: NamedModels) -> Recipe:
    """Return the mixture recipe of a parsed file; raises `UserError` with file, line and key if it is not supported."""
    try:
        file = _MoeFile.model_validate(content)
    except ValidationError as error:
        raise UserError(first_problem(error, named.path, named.lines, _MoeFile)) from None
    _refuse_unsupported(file, named)
    router, router_options = GATES[file.gate_mode]
    names_in_file = {_SEED: named.model(file.base_model, ("base_model",))}
    """Name of a model in the recipe -> its name in the file, where several experts can have the same model."""
    experts = [(expert, ("experts", number)) for number, expert in enumerate(file.experts)]
    experts += [(expert, ("shared_experts", number)) for number, expert in enumerate(file.shared_experts or ())]
    sources: list[SourceSlice] = []
    for expert, key in experts:
        source = named.model(expert.source_model, (*key, "source_model"))
        # the same model can occur several times with different prompts
        names = (source, *(f"{source}#{copy}" for copy in range(2, len(experts) + 1)))
        name = next(name for name in names if name not in names_in_file)
        names_in_file[name] = source
        parameters = _parameters(expert)
        if key[0] == "shared_experts":
            parameters["shared_expert"] = True
        if router in _FROM_PROMPTS and not any(prompt.strip() for prompt in expert.positive_prompts or ()):
            raise UserError(
                f"{named.at(*key)}: gate_mode '{file.gate_mode}' needs positive_prompts (example texts) for "
                f"'{expert.source_model}'; add some, or use gate_mode: random"
            )
        sources.append(SourceSlice(name, parameters=parameters, place=named.at(*key)))
    if router in _FROM_PROMPTS:
        _require_different_prompts(file, named)
    options = {
        "router": router,
        "router_options": dict(router_options),
        "top_k": file.experts_per_token,
        "discard": True,  # as in mergekit: attention, norms and embeddings come from the base model
        "target": _target(file, named),
    }
    return Recipe(
        method="mixture",
        models={name: named.models[source] for name, source in names_in_file.items()},
        slices=(OutputSlice(tuple(sources), place=named.at("experts")),),
        seed=_SEED,
        adapter_bases={
            name: named.adapter_bases[source]
            for name, source in names_in_file.items()
            if source in named.adapter_bases and name != _SEED
        },
        references={
            f"{prefix}{name}": named.references[f"{prefix}{source}"]
            for prefix in ("", "base of ")
            for name, source in names_in_file.items()
            if f"{prefix}{source}" in named.references
        },
        scopes=(options,),
        dtype=named.dtype(file.dtype, "dtype"),
        tokenizer=file.tokenizer_source or "refuse",
    )


def _parameters(expert: _Expert) -> dict[str, Any]:
    """Return the options of an expert, without those that change nothing."""
    prompts = {"positive_prompts": expert.positive_prompts, "negative_prompts": expert.negative_prompts}
    parameters: dict[str, Any] = {key: list(value) for key, value in prompts.items() if value}
    if expert.noise_scale:
        parameters[NOISE] = expert.noise_scale
    if expert.residual_scale not in (None, 1):
        parameters[RESIDUAL] = expert.residual_scale
    return parameters


def _require_different_prompts(file: _MoeFile, named: NamedModels) -> None:
    prompts = [(expert.positive_prompts or (), expert.negative_prompts or ()) for expert in file.experts]
    if len(prompts) > 1 and all(others == prompts[0] for others in prompts):
        raise UserError(
            f"{named.at('experts')}: all experts have the same prompts, so the router cannot distinguish them; change the "
            "prompts, or use gate_mode: random"
        )


def _refuse_unsupported(file: _MoeFile, named: NamedModels) -> None:
    if file.experts_per_token is not None and file.experts_per_token > len(file.experts):
        raise UserError(
            f"{named.at('experts_per_token')}: 'experts_per_token' is {file.experts_per_token}, but there are only "
            f"{len(file.experts)} experts"
        )
    if len(file.shared_experts or ()) > 1:
        raise UserError(f"{named.at('shared_experts')}: more than one shared expert is not supported; keep one")
    if file.gate_mode not in GATES:
        raise UserError(
            f"{named.at('gate_mode')}: {unknown_name('gate_mode', file.gate_mode, GATES, listed_as='there are')}"
        )


def _target(file: _MoeFile, named: NamedModels) -> str:
    if file.architecture is None:
        return "auto"
    wanted = file.architecture.lower().removesuffix("moe").strip()
    if wanted not in ARCHITECTURES:
        raise UserError(
            f"{named.at('architecture')}: "
            f"{unknown_name('architecture', file.architecture, ARCHITECTURES, listed_as='there are')}"
        )
    return ARCHITECTURES[wanted]
