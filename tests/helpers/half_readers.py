"""Two processes that read a model together: `torchrun ... half_readers.py FOLDER` prints a line of JSON for each."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def read_half(folder: Path) -> None:
    """Print how many bytes one of two processes reads of a model, and the most memory that it takes for it."""
    import torch

    from expertctl.core.artefacts import safetensors_io
    from expertctl.core.models.outline import outline_of
    from expertctl.experts.runs.trainable import all_parameters
    from expertctl.experts.training.distributed.ranks import joined, leave
    from expertctl.experts.training.distributed.replicas import laid_out

    read, read_bytes = safetensors_io.TensorEntry.read, 0

    def counted(entry: safetensors_io.TensorEntry, begin: int = 0, end: int | None = None) -> bytearray:
        nonlocal read_bytes
        content = read(entry, begin, end)
        read_bytes += len(content)
        return content

    safetensors_io.TensorEntry.read = counted  # type: ignore[method-assign]
    with joined(120) as ranks:
        ranks.share([0.0])
        outline_of(folder)  # imports the model's class
        before = peak_memory(reset=True)
        outline = outline_of(folder)
        assert outline is not None
        part = all_parameters(outline.model)
        replica = laid_out(part, torch.device("cpu"), ranks, "fsdp", bfloat16=False, weights=outline)
        peak = peak_memory() - before
        total = sum(float(parameter.detach().to_local().double().sum()) for parameter in part.parameters.values())  # type: ignore[attr-defined]
        tied = replica.module.lm_head.weight is replica.module.model.embed_tokens.weight  # type: ignore[union-attr]
        line = json.dumps({"read": read_bytes, "peak": peak, "total": total, "tied": tied})
        for rank in range(ranks.world):
            ranks.wait()
            if rank == ranks.rank:
                print(line, flush=True)
    leave()


def peak_memory(*, reset: bool = False) -> int:
    """Return the highest resident size of this process in bytes, or with `reset` the size from now on."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


if __name__ == "__main__":
    read_half(Path(sys.argv[1]))
