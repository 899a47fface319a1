"""Reads mergekit-moe configuration files as mixture recipes: experts, prompts and gate modes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ...core.config.problems import first_problem
from ...core.config.settings import Section
from ...core.errors import UserError, unknown_name
from .mergekit_models import NamedModels
from .recipe import Recipe, whole_models

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
    noise_scale: float | None = None
    residual_scale: float | None = None


class _MoeFile(Section):
    base_model: Any
    experts: tuple[_Expert, ...] = Field(min_length=1)
    gate_mode: str = "hidden"
    dtype: str | None = None
    experts_per_token: int | None = Field(default=None, ge=1)
    """None: 2, or the number of experts if that is smaller."""
    shared_experts: list[Any] | None = None
    architecture: str | None = None
    tokenizer_source: Literal["base", "union"] | None = None


def read_mergekit_moe(content: Mapping[str, Any], lines: Mapping[Any, int], path: Path) -> Recipe:
    """Return the mixture recipe of a parsed file; raises `UserError` with file, line and key if it is not supported."""
    try:
        file = _MoeFile.model_validate(content)
    except ValidationError as error:
        raise UserError(first_problem(error, path, lines, _MoeFile)) from None
    named = NamedModels(path, lines)
    _refuse_unsupported(file, named)
    router, router_options = GATES[file.gate_mode]
    models = {_SEED: named.models[named.model(file.base_model, ("base_model",))]}
    expert_parameters: dict[str, dict[str, Any]] = {}
    for number, expert in enumerate(file.experts):
        source = named.model(expert.source_model, ("experts", number, "source_model"))
        # the same model can occur several times with different prompts
        names = (source, *(f"{source}#{copy}" for copy in range(2, len(file.experts) + 1)))
        name = next(name for name in names if name not in expert_parameters)
        if router in _FROM_PROMPTS and not any(prompt.strip() for prompt in expert.positive_prompts or ()):
            raise UserError(
                f"{named.at('experts', number)}: gate_mode '{file.gate_mode}' needs positive_prompts (example texts) for "
                f"'{expert.source_model}'; add some, or use gate_mode: random"
            )
        models[name] = named.models[source]
        prompts = {"positive_prompts": expert.positive_prompts, "negative_prompts": expert.negative_prompts}
        expert_parameters[name] = {key: list(value) for key, value in prompts.items() if value}
    parameters = list(expert_parameters.values())
    if router in _FROM_PROMPTS and len(parameters) > 1 and all(prompts == parameters[0] for prompts in parameters):
        raise UserError(
            f"{named.at('experts')}: all experts have the same prompts, so the router cannot distinguish them; change the "
            "prompts, or use gate_mode: random"
        )
    options = {
        "router": router,
        "router_options": dict(router_options),
        "top_k": file.experts_per_token,
        "discard": True,  # as in mergekit: attention, norms and embeddings come from the base model
        "target": _target(file, named),
    }
    return Recipe(
        method="mixture",
        models=models,
        slices=whole_models(tuple(expert_parameters), expert_parameters),
        seed=_SEED,
        adapter_bases={name: base for name, base in named.adapter_bases.items() if name in expert_parameters},
        scopes=(options,),
        dtype=named.dtype(file.dtype, "dtype"),
        tokenizer=file.tokenizer_source or "refuse",
    )


def _refuse_unsupported(file: _MoeFile, named: NamedModels) -> None:
    if file.experts_per_token is not None and file.experts_per_token > len(file.experts):
        raise UserError(
            f"{named.at('experts_per_token')}: 'experts_per_token' is {file.experts_per_token}, but there are only "
            f"{len(file.experts)} experts"
        )
    if file.shared_experts:
        raise UserError(f"{named.at('shared_experts')}: 'shared_experts' is not supported; all experts are routed")
    for number, expert in enumerate(file.experts):
        for key in ("noise_scale", "residual_scale"):
            if getattr(expert, key) not in (None, 0 if key == "noise_scale" else 1):
                raise UserError(f"{named.at('experts', number, key)}: '{key}' is not supported")
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
