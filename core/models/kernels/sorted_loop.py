"""A mixture's experts run one after the other, each on the tokens that were sent to it.

Shapes: N = tokens, k = experts of a token, S = N k rows sorted by expert, d = width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .sorted_rows import gated_sum
from .swiglu_experts import gated_experts, swiglu_experts
from .top_k_gates import choose_before_softmax

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "expertctl_sorted_loop"
"""What transformers' `experts_implementation` calls it."""


def mixed(
    experts: Sequence[Callable[[Tensor], Tensor]],
    hidden_Nd: Tensor,
    gates_Nk: Tensor,
    chosen_Nk: Tensor,
) -> Tensor:
    """Return the gated sum of each token's experts, (N, d); an expert runs once, on all of its tokens, if it has any."""

    def run(sorted_Sd: Tensor, counts: list[int]) -> Tensor:
        shares = zip(experts, torch.split(sorted_Sd, counts), strict=True)
        done = [expert(share) for expert, share in shares if len(share)]
        return torch.cat(done) if done else sorted_Sd

    return gated_sum(run, len(experts), hidden_Nd, gates_Nk, chosen_Nk)


def fused_experts(module: Any, hidden_Nd: Tensor, chosen_Nk: Tensor, gates_Nk: Tensor) -> Tensor:
    """Run the experts of one of transformers' classes, which keep all of a layer in two tensors; as `mixed`.

    What this is not made for goes to transformers' grouped kernel: other devices, compiling, other layouts, mixed
    precision, and gradients through another activation than SiLU.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    if not _runs_here(module, hidden_Nd):
        return cast(Tensor, grouped(module, hidden_Nd, chosen_Nk, gates_Nk))
    weights = module.gate_up_proj, module.down_proj
    learns = torch.is_grad_enabled() and any(one.requires_grad for one in (hidden_Nd, *weights))
    silu = type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")
    if learns and not silu:
        return cast(Tensor, grouped(module, hidden_Nd, chosen_Nk, gates_Nk))

    def run(sorted_Sd: Tensor, counts: list[int]) -> Tensor:
        if learns:
            return swiglu_experts(sorted_Sd, counts, *weights)
        activation = partial(nn.functional.silu, inplace=True) if silu else module.act_fn
        return gated_experts(sorted_Sd, counts, *weights, activation)

    return gated_sum(run, len(module.down_proj), hidden_Nd, gates_Nk.to(hidden_Nd.dtype), chosen_Nk)


def _runs_here(module: Any, hidden_Nd: Tensor) -> bool:
    return (
        hidden_Nd.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and _is_plain(module)  # others have no `gate_up_proj` to ask
        and hidden_Nd.dtype == module.gate_up_proj.dtype
    )


def _is_plain(module: Any) -> bool:
    """Tell whether an expert is `down(act_fn(gate(x)) * up(x))` and stored in the usual order."""
    from transformers.integrations.moe import _default_apply_gate

    if getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return False
    others = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    return module.has_gate and module.is_concatenated and not any(getattr(module, name) for name in others)


def use_sorted_loop(model: PreTrainedModel) -> None:
    """Make a model's experts run like this on a CPU, wherever it is the faster way (`examples/benchmarks/mixture.py`)."""
    any_runs_here = False
    for module in model.modules():
        choose_before_softmax(module)
        experts: Any = getattr(module, "experts", None)
        if isinstance(experts, nn.ModuleList) and hasattr(module, "router"):
            for part in experts.modules():
                if isinstance(part, nn.Linear):
                    lay_out_for_few_rows(part.weight)
        elif isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter) and _is_plain(experts):
            any_runs_here = True
            lay_out_for_few_rows(experts.gate_up_proj)
            lay_out_for_few_rows(experts.down_proj)
    if any_runs_here and model._can_set_experts_implementation():
        register_sorted_loop()
        model.set_experts_implementation(NAME)


def register_sorted_loop() -> None:
    """Make transformers know the way by its name, as a model wants it that was pickled whole in another process."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, fused_experts)


def lay_out_for_few_rows(weight: Tensor) -> None:
    """Store a weight, (..., out, in), that has more outputs than inputs with `out` innermost; shape and values stay.

    With a few hundred rows of x, `x @ weight.T` spends a sixth of its time on turning the weight over where it lies
    the other way. The second weight of an expert gains nothing, and its gradients lose; with AVX-512 all of them lose
    (`docs/log.md`). Other numbers than float32 are multiplied by another library, which arranges them itself.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return
    if weight.dtype == torch.float32 and weight.shape[-2] > weight.shape[-1]:
        weight.data = weight.data.mT.contiguous().mT
