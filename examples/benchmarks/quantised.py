"""Benchmark of models in 8 and 4 bits: bits per byte, memory of the weights, and time, beside full precision.

    python examples/benchmarks/quantised.py                   # a seed of 7 million parameters, pretrained first (some minutes)
    python examples/benchmarks/quantised.py --model FOLDER    # any Hugging Face causal language model

Both score the test text of the bundled corpora `python` and `manual`, in this process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml
from whole_numbers import at_least

from expertctl import Workspace, load_model

DOMAINS = ("python", "manual")


def main() -> None:
    options = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        workspace = make_workspace(Path(folder), options)
        print("| | bits per byte, python | manual | MB of weights | seconds |\n|---|---:|---:|---:|---:|")
        for name, quantise in (("float32", None), ("int8", "int8"), ("nf4", "nf4")):
            begin = time.perf_counter()
            scores = workspace.evaluate("seed", quantise=quantise).scores["seed"]
            seconds = time.perf_counter() - begin
            model, _ = load_model(workspace.layout.seed, dtype="float32", quantise=quantise)
            size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
            values = " | ".join(f"{scores[domain].values['bits_per_byte']:.4f}" for domain in DOMAINS)
            print(f"| {name} | {values} | {size / 1e6:,.1f} | {seconds:.1f} |", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a model; default: a seed is pretrained")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--tokens", type=at_least(1), default=600_000)
    return parser.parse_args(arguments)


def make_workspace(root: Path, options: argparse.Namespace) -> Workspace:
    """Return a workspace with the bundled domains and a seed."""
    content = {
        "seed": {"preset": options.preset, "training": {"tokens": options.tokens}},
        "domains": {name: {"bundled": name} for name in DOMAINS},
    }
    (root / "expertctl.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    workspace = Workspace(root)
    workspace.seed(options.model)
    return workspace


if __name__ == "__main__":
    main()
