"""Benchmark of stitching: cost of a training step relative to training the hub alone.

    python examples/benchmarks/stitching.py

Builds a hub and experts of the same shape with random weights, as `merge --method stitch` does, and trains each variant on
random tokens with AdamW in a fresh process: median seconds per step, peak memory, trained parameters. One thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from whole_numbers import at_least


def variants(experts: int) -> dict[str, dict[str, int]]:
    return {
        "hub alone, all of it": {"experts": experts, "stitches": 0},
        "stitches, 1": {"experts": experts, "stitches": 1},
        "stitches, 2": {"experts": experts, "stitches": 2},
        "stitches, 4": {"experts": experts, "stitches": 4},
    }


def model_of(given: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Return a model and its trainable parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from expertctl.merge.stitched.configuration import StitchedConfig
    from expertctl.merge.stitched.container import StitchedForCausalLM

    settings = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.width,
        intermediate_size=given.width * 3,
        num_hidden_layers=given.layers,
        num_attention_heads=given.width // 64,
        num_key_value_heads=given.width // 64,
    )
    torch.manual_seed(0)
    hub = LlamaForCausalLM(settings)
    if not given.stitches:
        return hub, list(hub.parameters())
    names = [f"expert{number}" for number in range(given.experts)]
    members = [{"name": name, "width": given.width, "num_layers": given.layers} for name in ("hub", *names)]
    config = StitchedConfig(settings.to_dict(), members, num_stitches=given.stitches)
    model = StitchedForCausalLM(config, hub, {name: LlamaForCausalLM(settings) for name in names})
    return model, list(model.stitches.parameters())


def steps(given: argparse.Namespace) -> dict[str, float]:
    """Take training steps in this process and return their cost."""
    import torch

    torch.set_num_threads(1)
    model, parameters = model_of(given)
    model.train()
    optimiser = torch.optim.AdamW(parameters, lr=1e-4)
    tokens = torch.randint(0, given.vocabulary, (given.batch, given.length))
    seconds = []
    for _ in range(given.steps + 1):
        begin = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "trained": sum(parameter.numel() for parameter in parameters),
        "total": sum(parameter.numel() for parameter in model.parameters()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=at_least(1), default=256)
    # as many as the variant with the most stitches has
    parser.add_argument("--layers", type=at_least(4), default=8)
    parser.add_argument("--vocabulary", type=at_least(1), default=4096)
    parser.add_argument("--batch", type=at_least(1), default=4)
    parser.add_argument("--length", type=at_least(1), default=256)
    parser.add_argument("--steps", type=at_least(1), default=5)
    parser.add_argument("--experts", type=at_least(1), default=3)
    parser.add_argument("--stitches", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.stitches is not None:
        print(json.dumps(steps(given)))
        return
    print(f"| what trains, beside {given.experts} experts | s per step | peak MB | trained | total |")
    print("|---|---:|---:|---:|---:|")
    for name, variant in variants(given.experts).items():
        words = [
            sys.executable,
            __file__,
            "--stitches",
            str(variant["stitches"]),
            "--experts",
            str(variant["experts"]),
        ]
        for key in ("width", "layers", "vocabulary", "batch", "length", "steps"):
            words += [f"--{key}", str(getattr(given, key))]
        figures = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        print(
            f"| {name} | {figures['seconds']:.2f} | {figures['peak_mb']:.0f} | {figures['trained']:,} | {figures['total']:,} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
