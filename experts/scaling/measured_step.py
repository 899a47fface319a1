"""Measures a training step in a process of its own: `python -m expertctl.experts.scaling.measured_step '{"hidden": 256, ...}'`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ...core.config.settings import TrainingConfig
from ...core.process.allocator import keep_freed_memory
from ...core.process.environment import prepare_libraries
from ...core.text.token_store import Row

STEPS = 6


class RandomBlocks:
    """Blocks of random tokens."""

    def __init__(self, vocabulary: int, block_size: int) -> None:
        self._vocabulary, self.block_size = vocabulary, block_size

    def __len__(self) -> int:
        return 1000

    def row(self, index: int) -> Row:
        return Row(np.random.default_rng(index).integers(0, self._vocabulary, self.block_size + 1))


def main(size: dict[str, Any], batch: int, length: int) -> None:
    """Print the CPU seconds of a step and the largest memory of this process, as the training worker would take them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..runs.trainable import all_parameters
    from ..training.steps.loop import TrainingLoop

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=False))
    config = TrainingConfig(
        tokens=STEPS * batch * length, sequence_length=length, batch_size=batch, device="cpu", inherit_optimiser=False
    )
    times, begun = [], time.process_time()
    for _ in TrainingLoop(all_parameters(model), RandomBlocks(size["vocab_size"], length), config).steps():
        times.append(time.process_time() - begun)
        begun = time.process_time()
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": statistics.median(times[1:]), "bytes": peak}))


if __name__ == "__main__":
    prepare_libraries()
    keep_freed_memory()
    main(**json.loads(sys.argv[1]))
