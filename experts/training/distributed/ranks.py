"""The processes that train one run together, as torchrun starts them, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from ....core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Strategy = Literal["ddp", "fsdp", "hsdp"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp", "hsdp")
"""How several processes hold a model: each the whole of it, each a part of every tensor, or each node the whole of it in parts."""
TIMEOUT_S = 1800.0
"""Seconds that a process waits for the others before it ends with an error."""


@dataclass(frozen=True)
class Ranks:
    """One of the processes that train a run together; a process that trains alone is rank 0 of 1."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process reads and writes for all: it prepares text, logs, and writes checkpoints and the result."""
        return self.rank == 0

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process, then in the others, which find its files finished."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    @property
    def on_this_node(self) -> int:
        """Number of processes on this node, as torchrun says; all if it does not divide them."""
        count = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        return count if self.world % count == 0 else self.world

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def share(self, values: Sequence[float]) -> list[float]:
        """Return the sum over all processes of each value."""
        if self.world == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def require_agreement(self, digest: str, what: str) -> None:
        """Raise `UserError` in every process that has another digest (sha256 in hexadecimal) than the main one."""
        if self.world == 1:
            return
        import torch
        import torch.distributed as dist

        own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
        of_main = own.clone()
        dist.broadcast(of_main, 0)
        if not torch.equal(own, of_main):
            raise UserError(
                f"process {self.rank} of {self.world} has {what} that differs from the main process's; give all "
                "processes the same files and versions"
            )


ALONE = Ranks()


def mean_over_processes() -> Callable[[Tensor], Tensor] | None:
    """Return the function that returns the mean of a tensor over the processes of this run; None for a single process."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None

    def mean(value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    return mean


@contextmanager
def joined(timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    """Join the processes that torchrun started beside this one, if it did; raises `UserError` if they cannot be reached."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:  # DistNetworkError, DistStoreError: not all came, or no such address
        raise UserError(
            f"the {world} processes of this run did not meet within {timeout_s:g} seconds ({str(error).splitlines()[0]}); "
            "check that all were started and reach MASTER_ADDR"
        ) from None
    try:
        yield Ranks(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()
