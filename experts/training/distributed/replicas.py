"""How a run's model is laid out over its processes: alone, replicated (DDP) or sharded (FSDP2, HSDP).

All strategies train on the same global batch. Checkpoints hold whole tensors, or their rows in order, whatever the strategy: a
run resumes on another number of processes and by another strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ....core.artefacts.safetensors_io import dtype_name, new_file, write_tensors
from ....core.errors import UserError
from .experts_apart import distribute_experts, expert_plan
from .ranks import ALONE, SHARDED, Ranks, Strategy, mean_over_processes

if TYPE_CHECKING:
    from ....core.hooks.training import TrainablePart
    from ....core.models.outline import TensorSource


class Replica:
    """The whole model in one process."""

    ranks: Ranks = ALONE
    shards: int = 1
    """Number of processes that hold the model together."""

    def __init__(self, part: TrainablePart, device: torch.device) -> None:
        self.module: nn.Module = part.module.to(device).train()
        self.parameters = dict(part.parameters)
        self.device = device

    @property
    def forward(self) -> Callable[..., Any]:
        """Callable for the forward pass of a training step."""
        return self.module

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of one forward and backward pass of a step; gradients are exchanged in the last."""
        return nullcontext()

    def finish_gradients(self) -> None:
        """Exchange gradients that the backward pass did not."""

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients so that the norm over all of them is at most `limit`; return the norm before, shape ()."""
        return torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a value over all processes."""
        return value

    def full(self, tensor: Tensor) -> Tensor:
        """Return a whole tensor; all processes must ask for it."""
        return tensor

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Write whole tensors, one in memory at a time; return their digests in the main process. All processes must call it."""
        return write_tensors(path, tensors)

    def own_rows(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows of tensors that this process has to write for all to be written once (`JoinedParts`)."""
        return dict(tensors)

    def load(self, target: Tensor, source: TensorSource, name: str) -> None:
        """Overwrite a tensor, or this process's part of it, with a stored one."""
        target.copy_(source.read(name))

    def like(self, parameter: nn.Parameter, stored_shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an empty tensor of the optimiser's state, laid out as its parameter if it has the same shape."""
        if stored_shape == tuple(parameter.shape):
            return torch.empty_like(parameter, dtype=dtype)
        return torch.empty(stored_shape, dtype=dtype, device=parameter.device)

    def assemble(self) -> None:
        """Put the whole model together in the main process, to be written; it cannot be trained afterwards."""


class DistributedReplica(Replica):
    """The whole model in each of several processes, whose gradients are averaged (DistributedDataParallel)."""

    def __init__(self, part: TrainablePart, device: torch.device, ranks: Ranks) -> None:
        super().__init__(part, device)
        self.ranks = ranks
        self._ddp = nn.parallel.DistributedDataParallel(
            self.module,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=part.used_in_a_pass != "all",
        )

    @property
    def forward(self) -> Callable[..., Any]:
        return self._ddp

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self._ddp.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        return _mean(value)

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        return write_tensors(path, tensors) if self.ranks.is_main else {}


class ShardedReplica(Replica):
    """A part of every tensor in each of several processes (FSDP2): whole layers exist only while they compute.

    With fewer `shards` than processes, each group of so many holds the whole model in parts (HSDP), and exchanges gradients with
    the other groups. With a plan for `experts`, those of a mixture are not parts of tensors but whole (`experts_apart`).
    """

    def __init__(
        self,
        part: TrainablePart,
        device: torch.device,
        ranks: Ranks,
        shards: int,
        *,
        bfloat16: bool,
        weights: TensorSource | None = None,
        experts: dict[str, str] | None = None,
    ) -> None:
        """Lay out a model that every process has, or one on the meta device, of whose `weights` each reads its part."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.module, self.device, self.ranks = part.module.train(), device, ranks
        if weights is None:
            self.module.cpu()  # fully_shard moves one layer after the other to the device
            _broadcast(self.module, ranks)  # shards of different models would be joined silently
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        for parameter in names:  # fully_shard refuses the column-major weights of `lay_out_for_few_rows`
            parameter.data = parameter.data.contiguous()
        paths = {name: names[parameter] for name, parameter in part.parameters.items()}
        # fully_shard refuses parameters without dimensions: they stay whole, and `finish_gradients` averages their gradients
        scalars = {parameter for parameter in names if parameter.dim() == 0}
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
        self.shards, self._groups = shards, ranks.world // shards
        mesh = init_device_mesh(
            device.type, (self._groups, shards, 1), mesh_dim_names=("groups", "shards", "same_batch")
        )
        experts_of_all = distribute_experts(self.module, experts, mesh) if experts else []
        apart = {self.module.get_parameter(name) for name in experts_of_all}
        settings: dict[str, Any] = {
            "mesh": mesh["groups", "shards"] if self._groups > 1 else mesh["shards"],
            "mp_policy": policy,
            "ignored_params": scalars | apart,
        }
        for layer in layers_of(self.module):
            fully_shard(layer, **settings)
        fully_shard(self.module, **settings)
        if weights is None:
            for scalar in scalars:
                scalar.data = scalar.data.to(device)
        else:
            _allocate(self.module, device)
            self._read(weights)
        self.parameters = {name: self.module.get_parameter(path) for name, path in paths.items()}
        self._apart = [self.parameters[name] for name, path in paths.items() if path in experts_of_all]
        self._whole = [parameter for parameter in self.parameters.values() if not _is_sharded(parameter)]
        part.parameters = self.parameters

    @torch.no_grad()
    def _read(self, weights: TensorSource) -> None:
        """Read this process's part of every parameter and persistent buffer."""
        seen: set[Tensor] = set()  # tied parameters have one name in files
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if tensor not in seen:
                self.load(tensor, weights, name)
                seen.add(tensor)

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[Any]:
        self.module.set_requires_gradient_sync(is_last)  # type: ignore[operator]  # of FSDPModule
        return nullcontext()

    def finish_gradients(self) -> None:
        for parameter in self._whole:
            if parameter.grad is not None:
                parameter.grad.copy_(_mean(parameter.grad))
        for parameter in self._apart:  # the tokens of all processes have added to it
            if parameter.grad is not None:
                _local(parameter.grad).div_(self.ranks.world)

    def clip(self, limit: float) -> Tensor:
        """Scale gradients by the norm over all processes; torch's own refuses sharded and whole gradients together."""
        import torch.distributed as dist

        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        sharded = torch.zeros((), dtype=torch.float32, device=self.device)
        whole = torch.zeros_like(sharded)
        for gradient in gradients:
            target = sharded if _is_sharded(gradient) else whole
            target += _local(gradient).float().square().sum()
        dist.all_reduce(sharded)
        norm = (sharded / self._groups + whole).sqrt()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for gradient in gradients:
            _local(gradient).mul_(factor)
        return norm

    def mean(self, value: Tensor) -> Tensor:
        return _mean(value)

    def full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # of DTensor

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        names = sorted(tensors)
        if not self.ranks.is_main:
            for name in names:
                self.full(tensors[name])
            return {}
        shapes = {name: (dtype_name(tensors[name].dtype), tuple(tensors[name].shape)) for name in names}
        with new_file(path, shapes) as file:
            for name in names:
                file.add(name, self.full(tensors[name]))
        return file.digests()

    def own_rows(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.ranks.rank >= self.shards:  # the first group writes
            return {}
        rows = {
            name: _local(tensor)
            for name, tensor in tensors.items()
            if _is_sharded(tensor) or self.ranks.is_main  # which writes what all have
        }
        return {name: tensor for name, tensor in rows.items() if tensor.numel()}

    def load(self, target: Tensor, source: TensorSource, name: str) -> None:
        if not _is_sharded(target):
            target.copy_(source.read(name))
            return
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]  # of DTensor
        shape, offset = compute_local_shape_and_global_offset(target.shape, mesh, placements)
        begin, rows = offset[0], shape[0]  # FSDP2 shards the first dimension
        if not rows:
            return  # there are fewer rows than processes
        per_row = target.numel() // max(target.shape[0], 1)
        piece = source.span(name, begin * per_row, (begin + rows) * per_row)
        _local(target).copy_(piece.reshape(shape))

    def assemble(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the last forward pass leaves the outermost module whole
        assembled: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
        for module in self.module.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if _is_sharded(parameter) and parameter not in assembled:
                    whole = self.full(parameter.detach())
                    kept = whole.to("cpu", copy=True) if self.ranks.is_main else torch.empty(0)
                    assembled[parameter] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
                if parameter in assembled:
                    setattr(module, name, assembled[parameter])
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.__class__ = type(module).__bases__[1]  # the class that it had before `fully_shard`


def laid_out(
    part: TrainablePart,
    device: torch.device,
    ranks: Ranks,
    strategy: Strategy,
    *,
    bfloat16: bool,
    weights: TensorSource | None = None,
) -> Replica:
    """Return the model of a run as its processes hold it; sharded, it may come without its `weights` (`Outline`)."""
    if ranks.world == 1:
        return Replica(part, device)
    if strategy in SHARDED:
        _require_shardable(part)
        shards = ranks.on_this_node if strategy == "hsdp" else ranks.world
        experts = expert_plan(part.module, ranks.world) if strategy == "ep" else None
        return ShardedReplica(part, device, ranks, shards, bfloat16=bfloat16, weights=weights, experts=experts)
    return DistributedReplica(part, device, ranks)


def _require_shardable(part: TrainablePart) -> None:
    """Raise `UserError` for a trainer that sharding would change without an error."""
    if part.used_in_a_pass == "some":
        raise UserError(
            "sharding needs a gradient for the same parameters in every process, and this trainer's depend on the "
            "text; use ddp"
        )
    if any(not parameter.is_floating_point() for parameter in part.module.parameters()):
        raise UserError("weights in few bits cannot be sharded; use ddp")
    for name, parameter in part.parameters.items():  # sharding replaces the parameters, and their hooks are lost
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UserError(f"this trainer changes the gradient of '{name}', which sharding would undo; use ddp")


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the modules that are sharded one by one: the outermost of those that transformers does not split."""
    classes = {name for model in module.modules() for name in getattr(model, "_no_split_modules", None) or ()}
    found: list[nn.Module] = []

    def search(parent: nn.Module) -> None:
        for child in parent.children():
            if type(child).__name__ in classes:
                found.append(child)
            else:
                search(child)

    search(module)
    return found


def require_divisible(batch_size: int, ranks: Ranks) -> None:
    """Raise `UserError` unless every process gets as many blocks of a forward pass as the others."""
    if batch_size % ranks.world:
        raise UserError(
            f"training.batch_size is {batch_size}, which {ranks.world} processes cannot share equally; make it a multiple of "
            f"{ranks.world}, or start another number of processes"
        )


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # of DTensor
    return local


def _mean(value: Tensor) -> Tensor:
    mean = mean_over_processes()
    return value if mean is None else mean(value)


def _broadcast(module: nn.Module, ranks: Ranks) -> None:
    """Copy parameters and buffers of the main process to the others."""
    import torch.distributed as dist

    tensors: Iterable[Tensor] = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        dist.broadcast(tensor.data, 0)


def _allocate(module: nn.Module, device: torch.device) -> None:
    """Give the tensors on the meta device memory on another one, without values; tied parameters stay tied."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    module._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
    )
    for first, *others in names.values():
        for other in others:
            holder, _, leaf = other.rpartition(".")
            setattr(module.get_submodule(holder), leaf, module.get_parameter(first))
