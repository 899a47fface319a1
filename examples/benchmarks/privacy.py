"""Benchmark of private training: cost of a step relative to ordinary training, with one or several blocks per forward pass.

    python examples/benchmarks/privacy.py

A Llama with random weights is trained on random tokens; every step draws all blocks. CPU times are measured in turn in
one process, so that the ratios hold on a busy machine; peak memory is that of a fresh process for each loop. One thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from whole_numbers import at_least

from expertctl.core.hooks.training import Trainer, TrainingContext

LOOPS = ("ordinary", "ordinary, one block at a time", "private", "private, one block at a time")


def step_of(given: argparse.Namespace, loop: str, trains: str) -> Callable[[], Any]:
    """Return a function that takes one step of a training loop, including the optimiser step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from expertctl.core.config.settings import DpConfig, TrainingConfig
    from expertctl.core.hooks.manager import installed_plugins
    from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part
    from expertctl.experts.training.privacy.accounting import Mechanism
    from expertctl.experts.training.privacy.loop import PrivateTrainingLoop
    from expertctl.experts.training.privacy.noise import seeded_source
    from expertctl.experts.training.steps.loop import TrainingLoop

    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = given.width // 64
    settings = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.width,
        intermediate_size=given.width * 3,
        num_hidden_layers=given.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    part = installed_plugins().offer(Trainer, trains).prepare(TrainingContext(LlamaForCausalLM(settings)))
    folder = Path(tempfile.mkdtemp())
    ids = torch.randint(1, given.vocabulary, (given.batch * given.length,)).tolist()
    write_part(folder, [EncodedDocument("x", ids)], separator=0, vocabulary=given.vocabulary)
    blocks = TokenBlocks(TokenStore(folder), given.length)
    assert len(blocks) == given.batch
    single = loop.endswith("one block at a time")
    config = TrainingConfig(
        tokens=10**9,
        sequence_length=given.length,
        batch_size=1 if single else given.batch,
        accumulation=given.batch if single else 1,
        learning_rate=1e-4,
        device="cpu",
    )
    if loop.startswith("private"):
        mechanism = Mechanism(1.0, 1.0, 1.0, config.steps)
        dp = DpConfig(epsilon=8, delta=1e-6)
        steps = PrivateTrainingLoop(part, blocks, config, dp, mechanism, seeded_source(0)).steps()
    else:
        steps = TrainingLoop(part, blocks, config).steps()
    return lambda: float(next(steps).loss)


def times(given: argparse.Namespace, trains: str) -> dict[str, float]:
    """Return the median CPU seconds per step of each loop, measured in turn."""
    steps = {loop: step_of(given, loop, trains) for loop in LOOPS}
    seconds: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    for round_number in range(given.rounds + 1):
        for loop, step in steps.items():
            begin = time.process_time()
            step()
            if round_number:
                seconds[loop].append(time.process_time() - begin)
    return {loop: statistics.median(values) for loop, values in seconds.items()}


def peak(given: argparse.Namespace, loop: str, trains: str) -> float:
    """Return the peak memory of a fresh process that takes two steps, in MB."""
    words = [sys.executable, __file__, "--loop", loop, "--trains", trains]
    for key in ("width", "layers", "vocabulary", "batch", "length"):
        words += [f"--{key}", str(getattr(given, key))]
    return float(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=at_least(1), default=256)
    parser.add_argument("--layers", type=at_least(1), default=8)
    parser.add_argument("--vocabulary", type=at_least(1), default=4096)
    parser.add_argument("--batch", type=at_least(1), default=8)
    parser.add_argument("--length", type=at_least(1), default=256)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    parser.add_argument("--trains", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.loop is not None:
        step = step_of(given, given.loop, given.trains)
        step()
        step()
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
        return
    parts = ("all", "feed_forward")
    # before this process grows: a child's peak begins with its parent's
    peaks = {(trains, loop): peak(given, loop, trains) for trains in parts for loop in LOOPS}
    print("| trains | loop | CPU s per step | times ordinary | peak MB |")
    print("|---|---|---:|---:|---:|")
    for trains in parts:
        seconds = times(given, trains)
        for loop in LOOPS:
            ratio = seconds[loop] / seconds["ordinary"]
            print(
                f"| {trains} | {loop} | {seconds[loop]:.2f} | {ratio:.2f} | {peaks[trains, loop]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
