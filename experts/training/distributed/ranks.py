"""The processes that train one run together, as torchrun starts them, and what they agree on."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from ....core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Strategy = Literal["ddp", "fsdp", "hsdp", "ep"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp", "hsdp", "ep")
"""How several processes hold a model: each the whole of it, each a part of every tensor, each node the whole of it in parts, or
each some experts of a mixture and a part of every other tensor."""
SHARDED: tuple[Strategy, ...] = ("fsdp", "hsdp", "ep")
"""The strategies in which a process holds a part of the model."""
TIMEOUT_S = 1800.0
"""Seconds that a process waits for the others before it ends with an error."""


@dataclass(frozen=True)
class Ranks:
    """One of the processes that train a run together; a process that trains alone is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    group: Any = None
    """torch's process group for what they exchange on the CPU; None: the default one."""

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

            dist.barrier(self.group)

    def apart(self) -> Ranks:
        """Return the same processes with a group of their own, for a thread beside the training; all must call this."""
        if self.world == 1:
            return self
        import torch.distributed as dist

        return replace(self, group=dist.new_group(backend="gloo"))

    def share(self, values: Sequence[float]) -> list[float]:
        """Return the sum over all processes of each value."""
        if self.world == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return [float(value) for value in total]

    def gather(self, digest: str) -> list[str]:
        """Return the digests (sha256 in hexadecimal) of all processes, by rank."""
        if self.world == 1:
            return [digest]
        import torch
        import torch.distributed as dist

        own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
        digests = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(digests, own, group=self.group)
        return [bytes(digest.tolist()).hex() for digest in digests]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Run the block, in which processes do not wait for each other; if it raises `UserError` in one, all raise it."""
        failure: UserError | None = None
        try:
            yield
        except UserError as error:
            failure = error
        if self.world > 1:
            reasons = self._gather_text(str(failure or ""))
            first = next((rank for rank, reason in enumerate(reasons) if reason), None)
            if failure is None and first is not None:
                failure = UserError(f"process {first} of {self.world}: {reasons[first]}")
        if failure is not None:
            raise failure

    def _gather_text(self, text: str) -> list[str]:
        """Return the texts of all processes, by rank."""
        import torch
        import torch.distributed as dist

        own = torch.tensor(list(text.encode()), dtype=torch.uint8)
        lengths = self.share([len(own) if rank == self.rank else 0 for rank in range(self.world)])
        padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        padded[: len(own)] = own
        gathered = [torch.empty_like(padded) for _ in lengths]
        if len(padded):
            dist.all_gather(gathered, padded, group=self.group)
        return [
            bytes(text_bytes[: int(length)].tolist()).decode()
            for text_bytes, length in zip(gathered, lengths, strict=True)
        ]

    def require_agreement(self, values: Sequence[str], what: str) -> None:
        """Raise `UserError` in every process unless all have the same values; `what` says what they are."""
        of_main, *others = self.gather(hashlib.sha256("\n".join(values).encode()).hexdigest())
        for rank, other in enumerate(others, 1):
            if other != of_main:
                raise UserError(
                    f"process {rank} of {self.world} does not have the main process's {what}; start all with the same "
                    "files, options and versions"
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


def leave(status: int = 0) -> NoReturn:
    """End this process, which has left the others; one of several ends without the interpreter's own clean-up.

    gloo's threads outlive their group as long as a sharded model refers to it. One that lets go of its last tensor while
    the interpreter is cleaned up aborts the process, and torchrun would take a finished run for a failed one.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
