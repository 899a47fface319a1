"""Plan a mixture from a seed and its experts: shared tensors, expert tensors and initial router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from ...core.hooks import merging as hooks
from ...core.hooks.manager import installed_plugins
from ...core.hooks.mixtures import Architecture, RouterInputs, RouterRows, RouterStart
from ...core.manifests.generalist import MixtureRecord, RouterRecord
from ...core.models.architectures import architecture_of
from ..engine.tensor_plan import Action, TensorPlan
from ..planning.assembly import (
    Assembly,
    AssemblyInputs,
    ExpertParts,
    SharedExpert,
    plan_assembly,
    split_feed_forward,
)
from ..recipes.perturbation import perturbations
from ..recipes.recipe import WEIGHT, whole_models
from ..sources.models import Source, StoredTensor
from ..sources.tensor_names import layer_names
from .options import MixtureOptions, shape_of
from .stated_settings import fill_config_defaults
from .targets import CONTAINER, choose_target, require_network_per_layer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .expert_models import ExpertModels

PUBLIC = "public"
"""Name of the seed's feed-forward network as an expert."""
SHARED_EXPERT = "shared_expert"
"""Option of the expert that all tokens pass through."""


def plan_mixture(inputs: hooks.AssemblyInputs, options: MixtureOptions) -> Assembly:
    """Plan a mixture of the recipe's experts; raises `UserError` for incompatible models or options."""
    from .expert_models import ExpertModels  # imports numpy, which listing plugins must not

    assert isinstance(inputs, AssemblyInputs), "assemblers pass on what the planner gave them"
    leading = inputs.leading
    family = architecture_of(str(leading.config.get("model_type")), leading.tensors)
    names, _ = split_feed_forward(leading.tensors, family)
    if not names:
        raise UserError(
            f"{leading.folder} has no feed-forward tensors where family '{family.name}' has them "
            f"({', '.join(family.feed_forward)}); describe the family in a plugin (hook `architectures`)"
        )
    if any(".experts." in name for name in names):
        raise UserError(
            f"the feed-forward networks of {leading.folder} ({family.name}) are mixtures of experts themselves, and cannot be "
            "experts of another one; merge models of this family to an average or an ensemble"
        )
    require_network_per_layer(leading.folder, family, leading.tensors, names, leading.num_layers)
    if PUBLIC in inputs.recipe.experts:
        raise UserError(
            f"an expert cannot be called '{PUBLIC}' in a mixture: that is the seed's feed-forward network; "
            "rename its folder"
        )
    common, routed = _split_shared_expert(inputs)
    experts = [_parts(inputs, name, names) for name in routed]
    if options.with_seed:
        experts.insert(0, ExpertParts(PUBLIC, {tensor: leading.tensors[tensor] for tensor in names}))
    shape = replace(shape_of(options, len(experts)), shared_expert=common is not None)
    dense = fill_config_defaults(leading.config, leading.folder) if family.mixtures else leading.config
    target = choose_target(family, dense, shape, options.target)
    shared, notes = _shared(inputs, options, family)
    slots = tuple(expert.name for expert in experts)
    router_method = installed_plugins().offer(RouterStart, options.router)
    if router_method.runs_experts:
        _require_runnable_experts(router_method.name, shared, common)
    is_fitted = inputs.validation is not None or not (router_method.uses_model or router_method.uses_text)
    common_parts = [_parts(inputs, common, names)] if common is not None else []
    models = ExpertModels(dense, shared, [*experts, *common_parts], inputs.recipe.dtype)
    gated = (*slots, *(parts.name for parts in common_parts))
    start = _router_start(inputs, router_method, options, gated, models, is_fitted=is_fitted)
    bias = options.bias
    if bias == "auto":
        bias = "drop" if start.unit is None else "fold"
    router, gate = _split_gate(apply_bias(start, bias), len(slots))
    tensors, config = plan_assembly(
        dense,
        family,
        target,
        shape,
        shared,
        experts,
        router,
        shared_expert=SharedExpert(common_parts[0], gate) if common_parts else None,
        dtype=inputs.recipe.dtype,
        layout=options.layout,
    )
    if target.name != CONTAINER and "F64" in {tensor.dtype for tensor in tensors}:
        raise UserError(
            f"mixture class '{target.name}' of transformers cannot compute in float64; choose the output dtype, for example "
            "--dtype float32, or the option target=container"
        )
    if target.name == CONTAINER and family.name not in installed_plugins().offers(Architecture):
        _require_runnable(config)  # no plugin describes this family
    return Assembly(
        tensors,
        config,
        slots,
        MixtureRecord(
            target=target.name,
            top_k=shape.top_k,
            router=RouterRecord(
                start=options.router,
                biases=bias if start.biases is not None else "none",
                uses_text=router_method.uses_text,
            ),
            options=asdict(options),
            family=family.name,
            dense=dict(dense),
            feed_forward=tuple(sorted({suffix for layer in layer_names(names).layers for suffix in layer})),
            shared_expert=common,
        ),
        notes,
        is_fitted,
        start.statistics,
    )


def _require_runnable_experts(router: str, shared: Mapping[str, TensorPlan], shared_expert: str | None) -> None:
    """Raise `UserError` for a mixture whose experts a router start cannot run one by one."""
    remedy = "choose another router, for example --option router=random"
    if any(plan.is_vocabulary for plan in shared.values()):
        raise UserError(
            f"router '{router}' runs every expert on the seed's text, and the experts have different vocabularies; {remedy}"
        )
    if shared_expert is not None:
        raise UserError(
            f"router '{router}' routes all tokens of a text to one expert, and all pass through the shared expert "
            f"'{shared_expert}' as well; {remedy}"
        )


def _split_shared_expert(inputs: AssemblyInputs) -> tuple[str | None, tuple[str, ...]]:
    """Return the expert that all tokens pass through (None: there is none), and all others."""
    settings = {name: inputs.expert_options[name].get(SHARED_EXPERT, False) for name in inputs.recipe.experts}
    for name, setting in settings.items():
        if not isinstance(setting, bool):
            raise UserError(f"{SHARED_EXPERT} of '{name}' is {setting!r}; it must be true or false")
    common = [name for name, is_shared in settings.items() if is_shared]
    routed = tuple(name for name in inputs.recipe.experts if name not in common)
    if len(common) > 1:
        raise UserError(f"{', '.join(common)} are all shared experts; a mixture has at most one")
    if not routed:
        raise UserError("a mixture needs an expert beside the shared one")
    return (common[0] if common else None), routed


def _parts(inputs: AssemblyInputs, expert: str, names: Sequence[str]) -> ExpertParts:
    """Return the FFN tensors of an expert, perturbed if its options say so."""
    changes = perturbations(inputs.expert_options[expert], expert, tuple(names))
    stored = {name: _tensor(inputs.sources[expert], name) for name in names}
    return ExpertParts(
        expert, {name: replace(tensor, perturbation=changes.get(name)) for name, tensor in stored.items()}
    )


def _split_gate(router: RouterRows, num_experts: int) -> tuple[RouterRows, NDArray[Any]]:
    """Return the router of the first experts, and the rows (L, d) of the last one, which is a shared expert if any."""
    biases = router.biases[:, :num_experts] if router.biases is not None else None
    return RouterRows(router.rows[:, :num_experts], biases), router.rows[:, -1]


def apply_bias(start: RouterRows, bias: str) -> RouterRows:
    """Return the router with biases folded into its rows, dropped or carried; raises `UserError` if they cannot be."""
    import numpy as np

    rows = np.asarray(start.rows, dtype=np.float32)
    if start.biases is None or bias == "drop":
        return RouterRows(rows)
    if bias == "carry":
        return RouterRows(rows, np.asarray(start.biases, dtype=np.float32))
    if start.unit is None:
        raise UserError(
            "this router start has no direction to fold its biases into; use bias: drop, or bias: carry "
            "with the container"
        )
    folded = rows + np.asarray(start.biases)[:, :, None] * np.asarray(start.unit)
    return RouterRows(folded.astype(np.float32))


def _tensor(source: Source, name: str) -> StoredTensor:
    if name not in source.tensors:
        raise UserError(f"'{source.name}' ({source.folder}) has no tensor '{name}', which the seed has")
    return source.tensors[name]


def _require_runnable(config: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the container can be built from a configuration and run its experts; loads no weights."""
    import torch

    from .container import MixtureConfig, MixtureFeedForward, MixtureForCausalLM

    with torch.device("meta"), torch.inference_mode():
        model = MixtureForCausalLM(MixtureConfig(**config))
        block = next(module for module in model.modules() if isinstance(module, MixtureFeedForward))
        rows_Nd = torch.zeros(3, block.router.weight.shape[1])
        try:
            shape = block.experts[0](rows_Nd).shape
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            shape = None
    if shape != rows_Nd.shape:
        raise UserError(
            f"the feed-forward network of '{config['member']['model_type']}' ({type(block.experts[0]).__name__}) does not "
            "map rows of hidden states to rows: models of this family cannot be merged into a mixture"
        )


# --- shared tensors ---


def _shared(
    inputs: AssemblyInputs, options: MixtureOptions, family: Architecture
) -> tuple[dict[str, TensorPlan], tuple[str, ...]]:
    """Return the plans of all tensors outside the feed-forward networks, by name, and notes for the user."""
    weights = {
        source.model: {WEIGHT: source.parameters[WEIGHT]}
        for part in inputs.recipe.slices
        for source in part.sources
        if WEIGHT in source.parameters
    }
    if options.shared == "average":
        experts = whole_models(inputs.recipe.experts, weights)
        recipe = replace(inputs.recipe, method="average", scopes=(), slices=experts)
        return _outside(inputs.dense(recipe), family), ()
    if weights:
        raise UserError(
            "weights apply to the average of the tensors outside the feed-forward networks, and this mixture takes "
            "those from the seed; remove the weights, or average those tensors (--option shared=average)"
        )
    changed = _changed_outside(inputs, family)
    if changed and not options.discard:
        name, tensors = next(iter(changed.items()))
        raise UserError(
            f"expert '{name}' has its own {summarize_names(tensors)}, and this mixture takes all tensors "
            "outside the feed-forward networks from the seed; train it with --trains flexolmo or "
            "feed_forward, average those tensors (--method btx), or drop them with --option discard=true"
        )
    notes = tuple(
        f"{len(tensors)} tensors of '{name}' outside the feed-forward networks are dropped"
        for name, tensors in changed.items()
    )
    if options.discard:
        notes += tuple(
            f"all tensors of '{name}' outside the feed-forward networks that differ from the seed are dropped"
            for name in inputs.recipe.experts
            if inputs.sources[name].kind not in ("expert", "adapter")
        )
    leading = inputs.recipe.leading
    names = [leading, *(name for name in inputs.recipe.experts if name != leading)]
    only_leading = {name: {WEIGHT: float(name == leading)} for name in names}
    recipe = replace(inputs.recipe, method="average", scopes=(), slices=whole_models(names, only_leading), seed=None)
    outside = _outside(inputs.dense(recipe), family)
    return {name: _copy_plan(plan, options.discard) for name, plan in outside.items()}, notes


def summarize_names(tensors: Sequence[str]) -> str:
    """Return the first of several tensor names and the number of the others, in words."""
    return f"'{tensors[0]}'" + (f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else "")


def _outside(plans: Sequence[TensorPlan], family: Architecture) -> dict[str, TensorPlan]:
    by_name = {plan.name: plan for plan in plans}
    _, outside = split_feed_forward(by_name, family)
    return {name: by_name[name] for name in outside}


def _copy_plan(plan: TensorPlan, discard: bool) -> TensorPlan:
    """Return the plan that copies the leading model's tensor and, without `discard`, requires equality."""
    if plan.is_vocabulary:
        return plan  # weights are 1 and 0: rows that the leading model lacks come from the models that have them
    experts = plan.experts[:1] if discard else tuple(dict.fromkeys(plan.experts))
    owners = dict(zip(plan.experts, plan.expert_names, strict=True))
    action: Action = "require_equal" if len(experts) > 1 else "copy"
    return replace(
        plan,
        action=action,
        experts=experts,
        expert_names=tuple(owners[expert] for expert in experts),
        weights=(),
        options=None,
        seed=None,
    )


def _changed_outside(inputs: AssemblyInputs, family: Architecture) -> dict[str, list[str]]:
    """Return the tensors outside the FFNs that our experts changed; those of other models are compared when read."""
    own = {
        name: sorted(inputs.sources[name].own)
        for name in inputs.recipe.experts
        if inputs.sources[name].kind in ("expert", "adapter") and name != inputs.recipe.leading
    }
    outside = {name: split_feed_forward(tensors, family)[1] for name, tensors in own.items()}
    return {name: tensors for name, tensors in outside.items() if tensors}


# --- the router ---


def _router_start(
    inputs: AssemblyInputs,
    router: RouterStart,
    options: MixtureOptions,
    slots: Sequence[str],
    models: ExpertModels,
    *,
    is_fitted: bool,
) -> RouterRows:
    """Return the rows of the router; zeros unless `is_fitted`."""
    import numpy as np

    leading = inputs.leading
    width = leading.config.get("hidden_size") or leading.config.get("n_embd")
    if not isinstance(width, int):
        raise UserError(f"{leading.model_folder / 'config.json'} has no hidden_size")
    shape = (leading.num_layers, len(slots), width)
    if not is_fitted:
        return RouterRows(np.zeros(shape, np.float32))
    trained = {
        name: tuple(source.manifest.domains)
        for name, source in inputs.sources.items()
        if source.manifest is not None and source.kind == "expert"
    }
    if leading.manifest is not None and PUBLIC in slots:
        trained[PUBLIC] = tuple(leading.manifest.domains)
    start = router.start(
        RouterInputs(
            seed=leading.model_folder,
            experts={name: inputs.sources[name].folder if name in inputs.recipe.experts else None for name in slots},
            num_layers=leading.num_layers,
            width=width,
            options=options.router_options,
            expert_options=inputs.expert_options,
            validation=inputs.validation or tuple,
            domains=trained,
            expert_model=models,
            has_bias=options.bias == "carry",
            statistics=inputs.router_statistics,
            reporter=inputs.reporter,
        )
    )
    if tuple(start.rows.shape) != shape:
        raise UserError(
            f"router start '{router.name}' returned rows of shape {list(start.rows.shape)}; {list(shape)} is required"
        )
    return start
