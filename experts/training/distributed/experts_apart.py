"""Expert parallelism: each process holds some experts of a mixture whole, and tokens travel to them and back.

The layers that do it are transformers': two all-to-all exchanges in each mixture layer, by the model's own plan.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ....core.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def expert_plan(module: nn.Module, processes: int) -> dict[str, str]:
    """Return transformers' style of expert parallelism for each parameter and module of the experts, parameters first.

    Raises `UserError` for a model without a plan, and for experts that the processes cannot share equally.
    """
    parameters = dict(module.named_parameters())
    names = [*parameters, *(name for name, _ in module.named_modules())]
    plan: dict[str, str] = getattr(module, "ep_plan", None) or {}
    styles = {name: style for name in names for pattern, style in plan.items() if fnmatchcase(name, pattern)}
    if "ep_dispatch_experts" not in styles.values():
        raise UserError(
            f"transformers has no plan for expert parallelism of {type(module).__name__}; use --strategy fsdp instead of ep"
        )
    for name in styles:
        if name in parameters and len(parameters[name]) % processes:
            raise UserError(
                f"{processes} processes cannot share the {len(parameters[name])} experts of '{name}' equally; start a "
                "number of processes that divides them, or use --strategy fsdp"
            )
    return styles


def distribute_experts(module: nn.Module, plan: dict[str, str], mesh: Any) -> list[str]:
    """Leave each process of a mesh its experts, as DTensors with the experts in dimension 0; return their names.

    `mesh` has the dimensions `shards` and `same_batch`; the latter, of size 1, is that of processes that share a batch.
    """
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    names = [name for name, _ in module.named_parameters() if name in plan]
    apply_expert_parallelism(module, mesh["shards"], mesh["same_batch"], plan, ep_implementation="all_to_all")
    return names
