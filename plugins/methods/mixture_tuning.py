"""Training a finished mixture further: its router alone, or all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...core.errors import UserError
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least
from ...core.hooks.training import TrainablePart, Trainer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ...merge.mixture.routing.log import RoutingLog


@dataclass(frozen=True)
class RouterTuning:
    """How the router's rows train while everything else stays (FlexOlmo, arXiv:2507.07024, section 3.3.3)."""

    all_experts: bool = True
    """Send each token through all experts while training, so that every row learns from every token."""
    balance: float = 0.0
    """Weight of the loss that evens out the experts' load."""
    z_loss: float = 1e-3
    """Weight of the loss that keeps the router's logits small."""

    def __post_init__(self) -> None:
        check_at_least("balance", self.balance, 0)
        check_at_least("z_loss", self.z_loss, 0)


@dataclass(frozen=True)
class MixtureTraining:
    """How a whole mixture trains (Branch-Train-MiX, arXiv:2403.07816, section 2.2)."""

    balance: float = 0.01
    z_loss: float = 0.0
    experts: Literal["trained", "frozen"] = "trained"
    """Whether the experts' feed-forwards move."""
    routing: Literal["top_k", "sample"] = "top_k"
    """`sample`: draw one expert with Gumbel noise while training (Sample Top-1); for mixtures with top_k 1."""
    sample_rate: float = 1e-4
    """How fast the noise of `sample` cools down."""

    def __post_init__(self) -> None:
        check_at_least("balance", self.balance, 0)
        check_at_least("z_loss", self.z_loss, 0)
        check_at_least("sample_rate", self.sample_rate, 0)


def require_mixture(folder: Path, options: Any, domains: Sequence[str]) -> None:
    """Raise `UserError` for a folder that is no mixture of ours."""
    from ...core.artefacts.lineage import read_manifest

    manifest = read_manifest(folder)
    record = manifest.config.get("mixture") or {}
    if "experts" not in record or "router" not in record:
        raise UserError(
            f"'{folder.name}' is no mixture of experts: it has no router to train; name one with --from"
        )


def prepare_router(model: PreTrainedModel, options: RouterTuning) -> TrainablePart:
    """Freeze all but the routers' rows and biases; raises `UserError` for a model without routers."""
    from ...merge.mixture.routing.log import attach_log, routers_of, routing_measures, train_with_all_experts

    model.requires_grad_(False)
    parameters = {}
    for name, router in routers_of(model).items():
        if options.all_experts:
            train_with_all_experts(router)
        for key, parameter in router.named_parameters():
            parameter.requires_grad_(True)
            parameters[f"{name}.{key}"] = parameter
    log, _ = attach_log(model)
    return TrainablePart(
        model,
        parameters,
        auxiliary_loss=_auxiliary(log, options.balance, options.z_loss),
        measures=lambda: routing_measures(log.layers()),
        notes=() if options.all_experts else _untaught(model, "leave out all_experts=false"),
    )


def _untaught(model: PreTrainedModel, instead: str, *, drawn: bool = False) -> tuple[str, ...]:
    """Return a note where what text says does not reach the routers, because the size of the only gate says nothing."""
    from ...core.models.kernels.top_k_gates import gates_sum_to_one
    from ...merge.mixture.routing.log import routers_of

    name, router = next(iter(routers_of(model).items()))
    if router.top_k != 1 or router.weight.shape[0] == 1:
        return ()
    layer, _, block = name.rpartition(".")[0].rpartition(".")
    behind = model.get_submodule(layer).named_children()
    if any(part.startswith(("post_feedforward_", "post_mlp_")) for part, _ in behind):
        return (
            f"text does not teach its router: with top_k 1 the norm behind '{block}' undoes the size of the only gate; "
            "merge with --option top_k=2",
        )
    if gates_sum_to_one(router) and not drawn:
        return (
            f"text does not teach its router: with top_k 1 and gates that sum to one every gate is 1; {instead}, or merge "
            "with --option normalized=false",
        )
    return ()


def prepare_mixture(model: PreTrainedModel, options: MixtureTraining) -> TrainablePart:
    """Train all of a mixture, or all but its experts; raises `UserError` for a model without routers."""
    from ...merge.mixture.routing.log import SampledTop1, attach_log, routers_of, routing_measures

    routers = routers_of(model)
    blocks = tuple(f"{name.rpartition('.')[0]}.experts." for name in routers)
    parameters = {}
    for name, parameter in model.named_parameters():
        moves = options.experts == "trained" or not name.startswith(blocks)
        parameter.requires_grad_(moves)
        if moves:
            parameters[name] = parameter
    samplers: list[SampledTop1] = []
    if options.routing == "sample":
        wrong = next((router.top_k for router in routers.values() if router.top_k != 1), None)
        if wrong is not None:
            raise UserError(
                f"routing 'sample' trains mixtures with top_k 1, and this one has {wrong}; merge with --option top_k=1"
            )
        samplers = [SampledTop1(router, options.sample_rate) for router in routers.values()]

    def set_sampling_step(step: int) -> None:
        for sampler in samplers:
            sampler.step = step

    log, _ = attach_log(model)
    return TrainablePart(
        model,
        parameters,
        auxiliary_loss=_auxiliary(log, options.balance, options.z_loss),
        tell_step=set_sampling_step if samplers else None,
        measures=lambda: routing_measures(log.layers()),
        notes=_untaught(model, "train with --option routing=sample", drawn=options.routing == "sample"),
    )


def _auxiliary(log: RoutingLog, balance: float, z: float) -> Callable[[], Tensor] | None:
    """Return what adds up the losses that have a weight; None where none has."""
    from ...merge.mixture.routing.log import balance_loss, z_loss

    losses = [(balance, balance_loss), (z, z_loss)]
    weighted = [(weight, loss) for weight, loss in losses if weight]
    if not weighted:
        return None

    def total() -> Tensor:
        first, *others = (weight * loss(log.layers()) for weight, loss in weighted)
        return first + others[0] if others else first

    return total


@hookimpl
def trainers() -> list[Trainer]:
    return [
        Trainer(
            "router",
            "the rows of a mixture's routers; everything else stays",
            prepare_router,
            RouterTuning,
            makes="generalist",
            require=require_mixture,
        ),
        Trainer(
            "mixture",
            "a whole mixture of experts, with a load-balancing loss",
            prepare_mixture,
            MixtureTraining,
            makes="generalist",
            require=require_mixture,
        ),
    ]
