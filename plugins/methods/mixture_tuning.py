"""Trainers `router` and `mixture`: fine-tune the router of a mixture, or the whole mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...core.errors import UserError
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least
from ...core.hooks.training import TrainablePart, Trainer, TrainingContext

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ...merge.mixture.routing.log import SampledTop1


@dataclass(frozen=True)
class RouterTuning:
    """Training options of the router, all else frozen (FlexOlmo, arXiv:2507.07024, section 3.3.3)."""

    all_experts: bool = True
    """Route each token to all experts during training, so that every row gets a gradient from every token."""
    balance: float = 0.0
    """Weight of the load-balancing loss."""
    z_loss: float = 1e-3
    """Weight of the router z-loss, which keeps the logits small."""

    def __post_init__(self) -> None:
        check_at_least("balance", self.balance, 0)
        check_at_least("z_loss", self.z_loss, 0)


@dataclass(frozen=True)
class MixtureTraining:
    """Training options of a whole mixture (Branch-Train-MiX, arXiv:2403.07816, section 2.2)."""

    balance: float = 0.01
    """Weight of the load-balancing loss."""
    z_loss: float = 0.0
    """Weight of the router z-loss, which keeps the logits small."""
    experts: Literal["trained", "frozen"] = "trained"
    """Whether the experts' feed-forward networks are trained."""
    routing: Literal["top_k", "sample"] = "top_k"
    """Routing during training; `sample` draws one expert with Gumbel noise and requires top_k 1."""
    sample_rate: float = 1e-4
    """Exponential decay rate per step of the temperature of `sample`."""

    def __post_init__(self) -> None:
        check_at_least("balance", self.balance, 0)
        check_at_least("z_loss", self.z_loss, 0)
        check_at_least("sample_rate", self.sample_rate, 0)


class RoutedPart(TrainablePart):
    """Parameters of a mixture, with losses on the decisions of its routers."""

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Mapping[str, nn.Parameter],
        options: RouterTuning | MixtureTraining,
        notes: Sequence[str],
        samplers: Sequence[SampledTop1] = (),
    ) -> None:
        from ...merge.mixture.routing.log import RoutingLog

        super().__init__(model, parameters, notes=notes)
        names = {name.partition(".experts.")[2].split(".")[0] for name in parameters if ".experts." in name}
        if any(name.isdigit() for name in names):  # experts that are modules run only if a token is routed to them
            self.used_in_a_pass = "some"
        self._log = RoutingLog(model)
        self._options, self._samplers = options, samplers

    def begin_step(self, step: int) -> None:
        for sampler in self._samplers:
            sampler.step = step

    def auxiliary_loss(self) -> Tensor | None:
        from ...experts.training.distributed.ranks import mean_over_processes
        from ...merge.mixture.routing.log import balance_loss, z_loss

        layers, losses = self._log.layers(), []
        if self._options.balance:
            losses.append(self._options.balance * balance_loss(layers, mean_over_processes()))
        if self._options.z_loss:
            losses.append(self._options.z_loss * z_loss(layers))
        return reduce(add, losses) if losses else None

    def measures(self) -> Mapping[str, float]:
        from ...merge.mixture.routing.log import routing_measures

        return routing_measures(self._log.layers())


def require_mixture(folder: Path, options: Any, domains: Sequence[str]) -> None:
    """Raise `UserError` unless a folder is a mixture of experts: of expertctl, or of a family with routers."""
    from ...core.manifests.manifest import read_manifest

    manifest = read_manifest(folder)
    is_mixture = manifest.merged is not None and manifest.merged.mixture is not None
    if not is_mixture and not _has_routers(folder):
        raise UserError(
            f"'{folder.name}' is not a mixture of experts, or the routers of its family are not known: there is no router to "
            "train; name a mixture with --from"
        )


def _has_routers(folder: Path) -> bool:
    """Return whether the model of transformers in a folder has routers; builds it without its tensors."""
    from ...core.artefacts.files import read_json
    from ...core.models.stored_names import empty_model
    from ...merge.mixture.routing.log import routers_of

    if str(read_json(folder / "config.json").get("model_type", "")).startswith("expertctl_"):
        return False
    try:
        return bool(routers_of(empty_model(folder)))
    except UserError:
        return False


def prepare_router(context: TrainingContext) -> TrainablePart:
    """Make only the routers trainable; raises `UserError` for a model without routers."""
    from ...merge.mixture.routing.log import routers_of, train_with_all_experts

    model = context.model
    options: RouterTuning = context.options
    model.requires_grad_(False)
    parameters = {}
    for name, router in routers_of(model).items():
        if options.all_experts:
            train_with_all_experts(router)
        for key, parameter in router.named_parameters():
            parameter.requires_grad_(True)
            parameters[f"{name}.{key}"] = parameter
    notes = () if options.all_experts else _gradient_notes(model, "remove all_experts=false")
    return RoutedPart(model, parameters, options, notes)


def _gradient_notes(model: PreTrainedModel, remedy: str, *, is_sampled: bool = False) -> tuple[str, ...]:
    """Return a note if a top-1 router gets no gradient because its gate has no effect."""
    from ...core.models.kernels.top_k_gates import gates_sum_to_one
    from ...merge.mixture.routing.log import routers_of

    name, router = next(iter(routers_of(model).items()))
    if router.top_k != 1 or router.weight.shape[0] == 1:
        return ()
    layer, _, block = name.rpartition(".")[0].rpartition(".")
    children = model.get_submodule(layer).named_children()
    if any(child.startswith(("post_feedforward_", "post_mlp_")) for child, _ in children):
        return (
            f"the router gets no gradient from text: with top_k 1 the norm after '{block}' cancels the "
            "gate; merge with --option top_k=2",
        )
    if gates_sum_to_one(router) and not is_sampled:
        return (
            "the router gets no gradient from text: with top_k 1 and normalized gates every gate is 1; "
            f"{remedy}, or merge with --option normalized=false",
        )
    return ()


def prepare_mixture(context: TrainingContext) -> TrainablePart:
    """Make a mixture trainable, optionally without experts; raises `UserError` if it has no routers."""
    from ...merge.mixture.routing.log import SampledTop1, routers_of

    model = context.model
    options: MixtureTraining = context.options
    routers = routers_of(model)
    blocks = tuple(f"{name.rpartition('.')[0]}.experts." for name in routers)
    parameters = {}
    for name, parameter in model.named_parameters():
        is_trainable = options.experts == "trained" or not name.startswith(blocks)
        parameter.requires_grad_(is_trainable)
        if is_trainable:
            parameters[name] = parameter
    samplers = []
    is_sampled = options.routing == "sample"
    if is_sampled:
        top_k = max(router.top_k for router in routers.values())
        if top_k != 1:
            raise UserError(
                f"routing 'sample' requires a mixture with top_k 1, and this one has {top_k}; merge with "
                "--option top_k=1"
            )
        samplers = [SampledTop1(router, options.sample_rate) for router in routers.values()]
    notes = _gradient_notes(model, "train with --option routing=sample", is_sampled=is_sampled)
    return RoutedPart(model, parameters, options, notes, samplers)


@hookimpl
def trainers() -> list[Trainer]:
    router = "routers of a mixture; all other parameters are frozen"
    mixture = "all parameters of a mixture of experts, with a load-balancing loss"
    common: dict[str, Any] = {"makes": "generalist", "require": require_mixture, "reads_weights": False}
    return [
        Trainer("router", router, prepare_router, RouterTuning, **common),
        Trainer("mixture", mixture, prepare_mixture, MixtureTraining, **common),
    ]
