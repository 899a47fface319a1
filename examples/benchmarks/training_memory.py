"""Benchmark of the memory of training: logits in pieces, activations computed again, LoRA, and export of a sharded model.

    python examples/benchmarks/training_memory.py [--vocabulary 100000] [--tokens 2048] [--layers 12]

Every row is measured in fresh processes that take two steps (or write the model), on the CPU. Given is the largest resident
memory above that before the second step (or before the model is made, or the export), once freed memory has been handed back
to the system.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whole_numbers import at_least

if TYPE_CHECKING:
    from expertctl import TrainablePart
    from expertctl.experts.training.steps.loop import TrainingLoop

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROWS: dict[str, dict[str, Any]] = {
    "whole logits": {"chunked_loss": False},
    "logits in pieces": {"chunked_loss": True},
    "whole logits, activations computed again": {"chunked_loss": False, "activation_checkpointing": True},
    "logits in pieces, activations computed again": {"chunked_loss": True, "activation_checkpointing": True},
}
EXPORTED = ("--vocabulary=8000", "--width=512")
"""A model whose matrices are all much smaller than the whole."""
TRAINERS = ("all", "lora")
FEW = 128
"""Tokens of a step whose memory is that of weights, gradients and optimiser."""
EXPORTS = {"gathered whole": "whole", "tensor by tensor": "pieces"}


def main() -> None:
    options = parse(sys.argv[1:])
    if options.measure is not None:
        print(json.dumps(step_memory(options, ROWS[options.measure])), flush=True)
        return
    if options.trains is not None:
        print(json.dumps(training_memory(options)), flush=True)
        return
    if options.export is not None:
        export_memory(options)
        return
    settings = [f"--{name}={getattr(options, name)}" for name in ("vocabulary", "tokens", "width", "layers")]
    print(
        f"| step of {options.tokens} tokens, {options.vocabulary:,} words | MB above the model | step s |\n|---|---:|---:|"
    )
    for row in ROWS:
        megabytes, seconds = json.loads(output([sys.executable, __file__, *settings, "--measure", row]))
        print(f"| {row} | {megabytes:,.0f} | {seconds:.2f} |", flush=True)
    print(
        f"\n| trainer | MB, {FEW} tokens | MB, {options.tokens:,} tokens | trained parameters |\n|---|---:|---:|---:|"
    )
    for row in TRAINERS:
        trains = [sys.executable, __file__, *settings, *EXPORTED, "--trains", row]
        few, _ = json.loads(output([*trains, f"--tokens={FEW}"]))
        megabytes, trained = json.loads(output(trains))
        print(f"| `{row}` | {few:,.0f} | {megabytes:,.0f} | {trained:,} |", flush=True)
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    print("\n| export of a model sharded over 2 processes | MB on the main process | file MB |\n|---|---:|---:|")
    for row, kind in EXPORTS.items():
        megabytes, size = json.loads(output([*together, __file__, *settings, *EXPORTED, "--export", kind]))
        print(f"| {row} | {megabytes:,.0f} | {size:,.0f} |", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=at_least(1000), default=100_000)
    parser.add_argument("--tokens", type=at_least(16), default=2048, help="tokens of a step, in blocks of 256 or fewer")
    parser.add_argument("--width", type=at_least(64), default=256, help="hidden size of the model, a multiple of 64")
    parser.add_argument("--layers", type=at_least(1), default=12)
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--trains", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--export", choices=EXPORTS.values(), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.splitlines()[-1]


def step_memory(options: argparse.Namespace, settings: dict[str, Any]) -> tuple[float, float]:
    """Return the memory of the second step in MB, and its time in seconds."""
    from expertctl.experts.runs.trainable import all_parameters

    with tempfile.TemporaryDirectory() as folder:
        steps = training_loop(options, all_parameters(new_model(options)), Path(folder), settings).steps()
        next(steps)
        before, begun = reset_peak(), time.perf_counter()
        next(steps)
        return resident("VmHWM") - before, time.perf_counter() - begun


def training_memory(options: argparse.Namespace) -> tuple[float, int]:
    """Return the memory of a model and two steps of a trainer in MB, and the number of trained parameters."""
    from expertctl.core.hooks.training import TrainingContext
    from expertctl.experts.runs.trainable import trainer_for

    trainer = trainer_for(options.trains)
    settings = trainer.options() if trainer.options is not None else None
    small = argparse.Namespace(vocabulary=1000, width=64, layers=1)
    trainer.prepare(TrainingContext(new_model(small), settings))  # imports
    with tempfile.TemporaryDirectory() as folder:
        before = reset_peak()
        part = trainer.prepare(TrainingContext(new_model(options), settings))
        loop = training_loop(options, part, Path(folder), {})
        for _ in loop.steps():
            pass
        return resident("VmHWM") - before, sum(parameter.numel() for parameter in loop.parameters.values())


def training_loop(
    options: argparse.Namespace, part: TrainablePart, folder: Path, settings: dict[str, Any]
) -> TrainingLoop:
    """Return a loop of two steps on random tokens, which are written to a folder."""
    import numpy as np
    import torch

    from expertctl.core.config.settings import TrainingConfig
    from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part
    from expertctl.experts.training.steps.loop import TrainingLoop

    torch.set_num_threads(1)
    length = min(options.tokens, 256)
    batch = options.tokens // length
    ids = np.random.default_rng(0).integers(1, options.vocabulary, size=4 * options.tokens)
    write_part(folder, [EncodedDocument("x", ids.tolist())], separator=0, vocabulary=options.vocabulary)
    config = TrainingConfig(
        tokens=2 * options.tokens, sequence_length=length, batch_size=batch, device="cpu", **settings
    )
    return TrainingLoop(part, TokenBlocks(TokenStore(folder), length), config)


def export_memory(options: argparse.Namespace) -> None:
    """Write a sharded model; the main process prints its memory and the size of the file, in MB."""
    import torch
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    from expertctl.experts.runs.trainable import all_parameters
    from expertctl.experts.training.distributed.ranks import joined, leave
    from expertctl.experts.training.distributed.replicas import laid_out

    with joined(300) as ranks, tempfile.TemporaryDirectory() as folder:
        part = all_parameters(new_model(options))
        replica = laid_out(part, torch.device("cpu"), ranks, "fsdp", bfloat16=False)
        path = Path(folder) / "model.safetensors"
        ranks.wait()
        before = reset_peak()
        if options.export == "whole":
            whole = get_model_state_dict(
                replica.module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
            if ranks.is_main:
                save_file({name: tensor for name, tensor in whole.items() if name in part.parameters}, path)
        else:
            replica.write(path, {name: parameter.detach() for name, parameter in part.parameters.items()})
        peak = resident("VmHWM") - before
        ranks.wait()
        if ranks.is_main:
            print(json.dumps((peak, path.stat().st_size / 1e6)), flush=True)
    leave()


def new_model(options: argparse.Namespace) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def reset_peak() -> float:
    """Hand freed memory back, let the peak begin anew (Linux), and return the resident memory in MB."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1]) / 1e3


if __name__ == "__main__":
    main()
