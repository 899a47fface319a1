"""From seed and experts to the plan of a mixture: what is shared, what is an expert's, how the router begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from ...core.hooks.manager import installed_plugins
from ...core.hooks.mixtures import Architecture, RouterInputs, RouterStart
from ..engine.tensor_plan import Action, TensorPlan
from ..planning.assembly import Assembly, ExpertParts, RouterParts, plan_assembly, split_feed_forward
from ..planning.assembly_inputs import AssemblyInputs
from ..recipes.recipe import WEIGHT, Recipe, whole_models
from ..sources.models import Source
from ..sources.tensor_names import layer_names
from .options import MixtureOptions, shape_of
from .stated_settings import with_all_stated
from .targets import CONTAINER, choose_target

if TYPE_CHECKING:
    from numpy.typing import NDArray

PUBLIC = "public"
"""What the seed's own feed-forward is called where it is an expert."""


def plan_mixture(inputs: AssemblyInputs, options: MixtureOptions) -> Assembly:
    """Return the plan of a mixture of the recipe's experts; raises `UserError` for what does not fit together."""
    leading = inputs.leading
    family = installed_plugins().architecture_of(str(leading.config.get("model_type")))
    names, _ = split_feed_forward(leading.tensors, family)
    if not names:
        raise UserError(
            f"{leading.folder} has no feed-forwards where family '{family.name}' keeps them "
            f"({', '.join(family.feed_forward)}); a plugin can say where: hook `architectures`"
        )
    if PUBLIC in inputs.recipe.experts:
        raise UserError(
            f"an expert of a mixture cannot be called '{PUBLIC}': that is the seed's own feed-forward; rename its folder"
        )
    experts = [
        ExpertParts(name, {one: _tensor(inputs.sources[name], one) for one in names})
        for name in inputs.recipe.experts
    ]
    if options.with_seed:
        experts.insert(0, ExpertParts(PUBLIC, {one: leading.tensors[one] for one in names}))
    shape = shape_of(options, len(experts))
    dense = with_all_stated(leading.config, leading.folder) if family.mixtures else leading.config
    target = choose_target(family, dense, shape, options.target)
    shared, notes = _shared(inputs, options, family)
    slots = tuple(expert.name for expert in experts)
    start = _router_start(inputs, options, slots)
    bias = options.bias
    if bias == "auto":
        bias = "drop" if start.unit is None else "fold"
    router = settle_bias(start, bias)
    tensors, config = plan_assembly(
        dense,
        family,
        target,
        shape,
        shared,
        experts,
        router,
        dtype=inputs.recipe.dtype,
        layout=options.layout,
    )
    if target.name == CONTAINER and family.name not in installed_plugins().architectures():
        require_runnable(config)  # of a family that nobody described
    return Assembly(
        tensors,
        config,
        slots,
        {
            "experts": list(slots),
            "target": target.name,
            "top_k": shape.top_k,
            "router": {
                "start": options.router,
                "biases": bias if start.biases is not None else "none",
                "uses_text": installed_plugins().router(options.router).uses_text,
            },
            "options": asdict(options),
            "family": family.name,
            "dense": dict(dense),
            "feed_forward": sorted({rest for layer in layer_names(names).layers for rest in layer}),
            "tuned": [],
        },
        notes,
    )


def settle_bias(start: RouterStart, choice: str) -> RouterParts:
    """Return rows and biases as the mixture will hold them; raises `UserError` where a bias cannot be folded."""
    import numpy as np

    rows = np.asarray(start.rows, dtype=np.float32)
    if start.biases is None or choice == "drop":
        return RouterParts(rows)
    if choice == "carry":
        return RouterParts(rows, np.asarray(start.biases, dtype=np.float32))
    if start.unit is None:
        raise UserError(
            "this router start has no direction to fold its biases into; use bias: drop, or carry with the container"
        )
    folded = rows + np.asarray(start.biases)[:, :, None] * np.asarray(start.unit)
    return RouterParts(folded.astype(np.float32))


def _tensor(source: Source, name: str) -> Any:
    if name not in source.tensors:
        raise UserError(f"'{source.name}' ({source.folder}) has no tensor '{name}', which the seed has")
    return source.tensors[name]


def require_runnable(config: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the container can hold such a model; weights are not needed."""
    import torch

    from .container import MixtureConfig, MixtureForCausalLM

    with torch.device("meta"):
        MixtureForCausalLM(MixtureConfig(**config))


# --- what is shared ---


def _shared(
    inputs: AssemblyInputs, options: MixtureOptions, family: Architecture
) -> tuple[dict[str, TensorPlan], tuple[str, ...]]:
    """Return the plans of all tensors outside the feed-forwards, by name, and what the user should know."""
    if options.shared == "average":
        plans = inputs.dense(_dense_recipe(inputs.recipe, inputs.recipe.experts))
        return _outside(plans, family), ()
    if any(WEIGHT in source.parameters for part in inputs.recipe.slices for source in part.sources):
        raise UserError(
            "weights say how much of each expert's tensors outside of its feed-forward is taken, and this mixture takes "
            "those from the seed; leave them out, or average those tensors (--option shared=average)"
        )
    changed = _changed_outside(inputs, family)
    if changed and not options.discard:
        name, tensors = next(iter(changed.items()))
        raise UserError(
            f"expert '{name}' has its own {first_of(tensors)}, and this mixture takes everything but feed-forwards from the seed; train it with --trains flexolmo or "
            "feed_forward, average those tensors (--method btx), or insist with --option discard=true"
        )
    notes = tuple(
        f"{len(tensors)} tensors outside of the feed-forwards of '{name}' are dropped"
        for name, tensors in changed.items()
    )
    if options.discard:
        notes += tuple(
            f"whatever '{name}' has of its own outside of its feed-forwards is dropped"
            for name in inputs.recipe.experts
            if inputs.sources[name].kind not in ("expert", "adapter")
        )
    leading = inputs.leading.name
    everyone = [leading, *(name for name in inputs.recipe.experts if name != leading)]
    plans = inputs.dense(
        replace(
            _dense_recipe(inputs.recipe, everyone),
            slices=whole_models(everyone, {name: {WEIGHT: float(name == leading)} for name in everyone}),
            seed=None,
        )
    )
    outside = _outside(plans, family)
    return {name: _of_leading(plan, options.discard) for name, plan in outside.items()}, notes


def first_of(tensors: Sequence[str]) -> str:
    """Return words for some tensors: the first by name, and how many more."""
    return f"'{tensors[0]}'" + (f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else "")


def _dense_recipe(recipe: Recipe, names: Sequence[str]) -> Recipe:
    weights = {
        source.model: {WEIGHT: source.parameters[WEIGHT]}
        for part in recipe.slices
        for source in part.sources
        if WEIGHT in source.parameters
    }
    return replace(recipe, method="average", scopes=(), slices=whole_models(names, weights))


def _outside(plans: Sequence[TensorPlan], family: Architecture) -> dict[str, TensorPlan]:
    by_name = {plan.name: plan for plan in plans}
    _, outside = split_feed_forward(by_name, family)
    return {name: by_name[name] for name in outside}


def _of_leading(plan: TensorPlan, discarding: bool) -> TensorPlan:
    """Return the plan of a tensor that is the leading model's, which all others must share unless theirs is dropped."""
    if plan.is_vocabulary:
        return plan  # weighed 1 and 0: rows that the leading model lacks come from who has them
    taken = plan.experts[:1] if discarding else tuple(dict.fromkeys(plan.experts))
    owners = dict(zip(plan.experts, plan.expert_names, strict=True))
    action: Action = "agree" if len(taken) > 1 else "copy"
    return replace(
        plan,
        action=action,
        experts=taken,
        expert_names=tuple(owners[one] for one in taken),
        weights=(),
        options=None,
        seed=None,
    )


def _changed_outside(inputs: AssemblyInputs, family: Architecture) -> dict[str, list[str]]:
    """Return the tensors that experts of ours, or adapters, changed outside of their feed-forwards.

    Foreign models are compared while they are read.
    """
    found = {}
    for name in inputs.recipe.experts:
        source = inputs.sources[name]
        if source.kind not in ("expert", "adapter") or source.name == inputs.leading.name:
            continue
        _, outside = split_feed_forward(sorted(source.own), family)
        if outside:
            found[name] = outside
    return found


# --- the router ---


def _router_start(inputs: AssemblyInputs, options: MixtureOptions, slots: Sequence[str]) -> RouterStart:
    import numpy as np

    router = installed_plugins().router(options.router)
    leading = inputs.leading
    width = leading.config.get("hidden_size") or leading.config.get("n_embd")
    if not isinstance(width, int):
        raise UserError(
            f"{leading.model_folder / 'config.json'} does not say how wide the model is (hidden_size)"
        )
    known: Mapping[str, tuple[str, ...]] = {
        name: tuple(source.manifest.data.get("domains", ()))
        for name, source in inputs.sources.items()
        if source.manifest is not None and source.kind == "expert"
    }
    shape = (leading.num_layers, len(slots), width)
    if router.uses_model and inputs.validation is None:
        return RouterStart(np.zeros(shape, np.float32))
    start = router.start(
        RouterInputs(
            seed=leading.model_folder,
            experts={
                name: inputs.sources[name].folder if name in inputs.recipe.experts else None for name in slots
            },
            num_layers=leading.num_layers,
            width=width,
            options=options.router_options,
            own=inputs.own,
            validation=inputs.validation or tuple,
            domains=known,
            say=inputs.say,
        )
    )
    _check_shape(start.rows, shape, router.name)
    return start


def _check_shape(rows: NDArray[Any], expected: tuple[int, ...], router: str) -> None:
    if tuple(rows.shape) != expected:
        raise UserError(
            f"router start '{router}' gave rows of {list(rows.shape)}; {list(expected)} are needed"
        )
