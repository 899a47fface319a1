"""Benchmark of merging: time and peak memory, relative to the speed of the disk and to mergekit.

    python examples/benchmarks/merging.py --mergekit /path/to/other/environment/bin/mergekit-yaml

Creates four related bf16 Llama checkpoints (220 million parameters each by default), merges them with whole commands in
fresh processes, and prints ratios within this run: medians of several rounds, separately for warm (files in the page
cache) and cold starts. Install mergekit in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from whole_numbers import at_least

from expertctl.core.artefacts.numeric import encode
from expertctl.core.artefacts.safetensors_io import header_of_file

METHODS = ("linear", "linear, equal weights", "slerp", "ties", "dare_ties", "passthrough")
WANTED = {"linear": 7.0, "slerp": 6.0, "ties": 6.0, "dare_ties": 6.0}
"""Wanted ratios of mergekit's time to ours."""
WEIGHTS = (0.4, 0.3, 0.2, 0.1)
"""Products with powers of two are exact, and faster than those with weights that people use."""
ENGINE = """
import sys, time
from pathlib import Path
from expertctl.core.hooks.manager import installed_plugins
from expertctl.merge.engine.calculator import run_merge
from expertctl.merge.recipes.mergekit_file import read_mergekit
from expertctl.merge.planning.plan import prepare_merge
import expertctl.merge.dense.averages.linear
plan = prepare_merge(read_mergekit(Path(sys.argv[1])))
output = Path(sys.argv[2]); output.mkdir()
begin = time.perf_counter()
run_merge(plan.method, plan.shards, output, fingerprint="benchmark")
print(time.perf_counter() - begin)
"""


@dataclass(frozen=True)
class Size:
    """The shape of a Llama."""

    hidden: int
    layers: int
    vocabulary: int = 32000

    def tensors(self) -> dict[str, tuple[int, ...]]:
        width, inner = self.hidden, self.hidden * 11 // 4
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, width)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shapes |= {f"{at}.self_attn.{letter}_proj.weight": (width, width) for letter in "qkvo"}
            shapes |= {f"{at}.mlp.{matrix}_proj.weight": (inner, width) for matrix in ("gate", "up")}
            shapes[f"{at}.mlp.down_proj.weight"] = (width, inner)
            shapes |= {f"{at}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (self.vocabulary, width)}

    def config(self) -> dict[str, object]:
        heads = max(self.hidden // 64, 1)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True)
class Cost:
    """Time and peak memory of one process."""

    seconds: float
    peak_mb: float


def models_of(folder: Path, size: Size, count: int) -> list[Path]:
    """Return the checkpoints, created in a separate process: the peak memory of later children starts at the size of this one."""
    process = multiprocessing.get_context("spawn").Process(target=make_models, args=(folder, size, count))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the checkpoints could not be made")
    return [folder / f"m{number}" for number in range(count)]


def make_models(folder: Path, size: Size, count: int) -> None:
    """Write related random checkpoints: a base and simulated fine-tuned models."""
    shapes = size.tensors()
    header, _ = header_of_file({name: ("BF16", shape) for name, shape in shapes.items()})
    for number in range(count):
        model = folder / f"m{number}"
        if (model / "model.safetensors").exists():
            continue
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(size.config()))
        base, change = np.random.default_rng(7), np.random.default_rng(100 + number)
        with (model / "model.safetensors").open("wb") as file:
            file.write(header)
            for shape in shapes.values():
                numbers = base.standard_normal(shape, dtype=np.float32) * 0.02 + (len(shape) == 1)
                if number:
                    numbers += change.standard_normal(shape, dtype=np.float32) * 0.002
                file.write(encode(numbers, "BF16").tobytes())
            os.fsync(file.fileno())


def write_recipes(folder: Path, models: Sequence[Path]) -> dict[str, Path]:
    """Write a mergekit configuration file for each method."""
    names = [model.name for model in models]
    others = [{"model": name, "parameters": {"weight": 1.0, "density": 0.5}} for name in names[1:]]
    plain = [{"model": name, "parameters": {"weight": 1.0}} for name in names]
    uneven = [{"model": name, "parameters": {"weight": weight}} for name, weight in zip(names, WEIGHTS, strict=True)]
    recipes: dict[str, dict[str, object]] = {
        "linear": {"models": uneven},
        "linear, equal weights": {"models": plain},
        "slerp": {
            "models": [{"model": name} for name in names[:2]],
            "base_model": names[0],
            "parameters": {"t": 0.4},
        },
        "ties": {"models": others, "base_model": names[0]},
        "dare_ties": {"models": others, "base_model": names[0]},
        "passthrough": {"models": [{"model": names[0]}]},
    }
    files = {}
    for method, content in recipes.items():
        files[method] = folder / f"{method}.yml"
        files[method].write_text(json.dumps({"merge_method": method.partition(",")[0], **content}))
    return files


def run(command: Sequence[str | Path], cwd: Path) -> tuple[Cost, str]:
    """Run a command and return its cost and standard output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # nobody is to compile source anew in each round
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begin = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], cwd=cwd, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        text = out.read()
        # mergekit writes its model and then dies without a network, looking for the models' cards
        if process.returncode and "mergekit" not in str(command[0]):
            raise SystemExit(f"{command}: {err.read()}")
    return Cost(seconds, usage.ru_maxrss / 1024), text


def evict(files: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Bench:
    """The models, the recipes and the compared commands of one run."""

    def __init__(self, folder: Path, size: Size, rounds: int, mergekit: Path | None, mergekit_rounds: int) -> None:
        self.folder, self.rounds, self.mergekit, self.mergekit_rounds = (
            folder,
            rounds,
            mergekit,
            mergekit_rounds,
        )
        self.models = models_of(folder, size, 4)
        self.recipes = write_recipes(folder, self.models)
        self.files = [model / "model.safetensors" for model in self.models]

    def rounds_of(self, measure: Callable[[], Cost], rounds: int, cold: bool = False) -> Cost:
        """Return the median time and the highest peak over several rounds."""
        costs = []
        for _ in range(rounds):
            shutil.rmtree(self.folder / "out", ignore_errors=True)
            if cold:
                evict(self.files)
            costs.append(measure())
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        return Cost(statistics.median(cost.seconds for cost in costs), max(cost.peak_mb for cost in costs))

    def floor(self) -> Cost:
        """Read all four inputs and copy one."""
        (self.folder / "out").mkdir()
        script = f"cat {' '.join(str(file) for file in self.files)} | cat > /dev/null && cp {self.files[0]} out/copy"
        return run(["sh", "-c", script], self.folder)[0]

    def ours(self, method: str) -> Cost:
        command = [
            sys.executable,
            "-m",
            "expertctl.cli.main",
            "merge",
            "--config",
            self.recipes[method],
            "-o",
            "out",
        ]
        return run([*command, "--quiet"], self.folder)[0]

    def engine(self) -> Cost:
        cost, text = run([sys.executable, "-c", ENGINE, self.recipes["linear"], "out"], self.folder)
        return Cost(float(text), cost.peak_mb)

    def theirs(self, method: str) -> Cost:
        assert self.mergekit is not None
        return run([self.mergekit, self.recipes[method], "out"], self.folder)[0]


def report(bench: Bench, methods: Sequence[str]) -> None:
    """Measure and print the tables."""
    for cold in (False, True):
        floor = bench.rounds_of(bench.floor, bench.rounds, cold)
        engine = bench.rounds_of(bench.engine, bench.rounds, cold)
        print(f"\n{'cold' if cold else 'warm'}: reading four inputs and copying one takes {floor.seconds:.2f} s")
        print(
            f"linear, engine only: {engine.seconds:.2f} s, {engine.seconds / floor.seconds:.2f} of that (at most 2.5)"
        )
        print("| method | expertctl s | peak MB | mergekit s | peak MB | mergekit / expertctl | wanted |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for method in methods:
            ours = bench.rounds_of(lambda method=method: bench.ours(method), bench.rounds, cold)  # type: ignore[misc]
            row = f"| {method} | {ours.seconds:.2f} | {ours.peak_mb:.0f} |"
            if bench.mergekit is not None:
                theirs = bench.rounds_of(
                    lambda method=method: bench.theirs(method),  # type: ignore[misc]
                    bench.mergekit_rounds,
                    cold,
                )
                row += f" {theirs.seconds:.2f} | {theirs.peak_mb:.0f} | {theirs.seconds / ours.seconds:.1f} |"
            else:
                row += " | | |"
            print(f"{row} {WANTED.get(method, '')} |", flush=True)


def report_memory(folder: Path, hidden: int, vocabulary: int, layers: Sequence[int], methods: Sequence[str]) -> None:
    """Print peak memory by number of layers."""
    print("\n| peak MB | " + " | ".join(f"{count} layers" for count in layers) + " |")
    print("|---|" + "---:|" * len(layers))
    peaks: dict[str, list[float]] = {method: [] for method in methods}
    for count in layers:
        bench = Bench(folder / f"layers{count}", Size(hidden, count, vocabulary), 1, None, 1)
        for method in methods:
            peaks[method].append(bench.rounds_of(lambda bench=bench, method=method: bench.ours(method), 1).peak_mb)  # type: ignore[misc]
    for method, megabytes in peaks.items():
        print(f"| {method} | " + " | ".join(f"{peak:.0f}" for peak in megabytes) + " |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of another environment")
    parser.add_argument("--mergekit-rounds", type=at_least(1), default=1)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--hidden", type=at_least(1), default=1024)
    parser.add_argument("--layers", type=at_least(1), default=12)
    parser.add_argument("--vocabulary", type=at_least(1), default=32000)
    parser.add_argument("--memory-layers", type=at_least(1), nargs="*", default=[2, 24])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--folder", type=Path, help="folder for the checkpoints; default: a temporary folder")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        size = Size(given.hidden, given.layers, given.vocabulary)
        bench = Bench(folder, size, given.rounds, given.mergekit, given.mergekit_rounds)
        report(bench, given.methods)
        if given.memory_layers:
            report_memory(folder, given.hidden // 2, given.vocabulary, given.memory_layers, given.methods)


if __name__ == "__main__":
    main()
