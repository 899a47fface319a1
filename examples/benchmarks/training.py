"""Benchmark of training: speed relative to a plain loop, with torch.compile, and time to the first step.

    python examples/benchmarks/training.py [--rounds 9] [--steps 4] [--no-compile]

All variants train the same 7-million-parameter model on the same blocks, in turn within one process, so that other load
on the machine affects all of them; figures are medians of the ratios of the rounds, in CPU seconds, one thread each. The time
to the first step is measured in fresh processes; transformers' Trainer is included if accelerate is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whole_numbers import at_least

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

BATCH, LENGTH = 4, 256

SETUP = """
import sys, time
import torch
from transformers import LlamaForCausalLM
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
import training
model, blocks = training.new_model(), training.new_blocks({folder!r})
begun, begun_cpu = time.perf_counter(), time.process_time()
def ready():
    print("ready", time.perf_counter() - begun, time.process_time() - begun_cpu)
"""
FIRST_STEP = {
    "expertctl": """
from expertctl.experts.runs.trainable import all_parameters
from expertctl.experts.training.steps.loop import TrainingLoop
loop = TrainingLoop(all_parameters(model), blocks, training.settings())
ready()
next(loop.steps())
""",
    "transformers.Trainer": """
from transformers import Trainer, TrainerCallback, TrainingArguments
class Begin(TrainerCallback):
    def on_step_begin(self, *arguments, **keywords):
        ready()
rows = [torch.from_numpy(blocks.block(index)[:-1]) for index in range(8)]
arguments = TrainingArguments(
    {folder!r} + "/trainer", max_steps=1, per_device_train_batch_size=training.BATCH, report_to=[], use_cpu=True,
    disable_tqdm=True, save_strategy="no", logging_strategy="no",
)
data = [{{"input_ids": row, "labels": row}} for row in rows]
Trainer(model, arguments, train_dataset=data, callbacks=[Begin()]).train()
""",
}
REPORT = """
print("process", time.process_time())
"""


def new_model() -> Any:
    """Return the model that every variant trains: the `small` preset of the Llama architecture."""
    import torch
    from transformers import AutoModelForCausalLM

    from expertctl.experts.runs.presets import model_config, preset

    torch.manual_seed(0)
    config = model_config(preset("small"), "llama", 0, 4096)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def new_blocks(folder: str) -> Any:
    """Return blocks of random tokens."""
    import numpy as np

    from expertctl.core.text.token_store import PART_FILE, EncodedDocument, TokenBlocks, TokenStore, write_part

    if not (Path(folder) / PART_FILE).exists():
        rows = np.random.default_rng(0).integers(1, 4096, size=(256, LENGTH)).tolist()
        write_part(Path(folder), (EncodedDocument("x", row) for row in rows), separator=0, vocabulary=4096)
    return TokenBlocks(TokenStore(Path(folder)), LENGTH)


def settings(**changes: Any) -> Any:
    from expertctl.core.config.settings import TrainingConfig

    return TrainingConfig(tokens=10_000_000, sequence_length=LENGTH, batch_size=BATCH, device="cpu", **changes)


def plain_loop(folder: str) -> Callable[[], None]:
    """Return a function that takes one step of a plain loop: fused AdamW on the same transformers model."""
    import numpy as np
    import torch

    model, blocks = new_model().train(), new_blocks(folder)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    position = 0

    def step() -> None:
        nonlocal position
        rows = [blocks.block((position + row) % len(blocks)) for row in range(BATCH)]
        position += BATCH
        tokens = torch.from_numpy(np.stack(rows))
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def our_loop(folder: str, **changes: Any) -> Callable[[], None]:
    """Return a function that takes one step of the project's loop."""
    from expertctl.experts.runs.trainable import all_parameters
    from expertctl.experts.training.steps.loop import TrainingLoop

    loop = TrainingLoop(all_parameters(new_model()), new_blocks(folder), settings(**changes))
    steps = loop.steps()

    def step() -> None:
        float(next(steps).loss)  # waits for the result

    return step


def measure_steps(folder: str, rounds: int, steps: int, compiled: bool) -> None:
    variants = {"plain loop": plain_loop(folder), "expertctl": our_loop(folder)}
    if compiled:
        variants["expertctl, compiled"] = our_loop(folder, compile=True)
    for name, step in variants.items():
        begun = time.perf_counter()
        for _ in range(3):
            step()
        print(f"{name}: warm after {time.perf_counter() - begun:.1f} s", file=sys.stderr)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            begun = time.process_time()
            for _ in range(steps):
                step()
            seconds[name].append(time.process_time() - begun)
    print("| loop | tokens per CPU second, median | ratio to the plain loop, median [quartiles] |")
    print("|---|---:|---:|")
    for name, times in seconds.items():
        ratios = [plain / own for plain, own in zip(seconds["plain loop"], times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        speed = steps * BATCH * LENGTH / statistics.median(times)
        print(f"| {name} | {speed:,.0f} | {middle:.2f} [{low:.2f}, {high:.2f}] |")


def measure_first_step(folder: str, rounds: int) -> None:
    names = ["expertctl"]
    if importlib.util.find_spec("accelerate"):
        names.append("transformers.Trainer")
    else:
        print("no accelerate: transformers.Trainer is left out", file=sys.stderr)
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            measured[name].append(first_step(name, folder))
    print("\n| seconds, median | built model to first step, wall | the same, CPU | process to end of first step, CPU |")
    print("|---|---:|---:|---:|")
    for name, rows in measured.items():
        cells = (f"{statistics.median(column):.2f}" for column in zip(*rows, strict=True))
        print(f"| {name} | {' | '.join(cells)} |")


def first_step(name: str, folder: str) -> tuple[float, float, float]:
    """Return seconds of a fresh process: (wall, CPU) from the built model to the first step, and CPU in total."""
    here = str(Path(__file__).parent)
    code = (SETUP + FIRST_STEP[name]).format(here=here, folder=folder) + REPORT
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    words = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith(("ready", "process")))
    wall, cpu = words["ready"].split()
    return float(wall), float(cpu), float(words["process"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=at_least(2), default=9)
    parser.add_argument("--steps", type=at_least(1), default=4, help="steps per variant and round")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure_steps(folder, options.rounds, options.steps, not options.no_compile)
        measure_first_step(folder, max(options.rounds // 3, 1))


if __name__ == "__main__":
    main()
