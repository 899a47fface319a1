"""Benchmark of mixtures: assembly against mergekit-moe, and speed against a dense feed-forward layer.

    python examples/benchmarks/mixture.py --mergekit-moe /path/to/other/environment/bin/mergekit-moe

Assembles four bf16 Llama checkpoints (220 million parameters each by default) with whole commands in fresh processes:
medians of several rounds, files in the page cache. Then times the forward pass, and forward and backward pass, of one
mixture layer with each implementation of the experts, relative to a dense feed-forward layer with as many active
operations. "Not routed" is the same number of separate feed-forward layers on equal shares of the rows: its loss comes
from small matrix products and from reading more weights, not from routing. One thread, alternating rounds, medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merging import Cost, Size, models_of, run
from whole_numbers import at_least, pair_of

from expertctl.core.process.allocator import keep_freed_memory
from expertctl.core.text.tokenizer import train_tokenizer

WANTED_RATIO = 6.0
WANTED_PEAK_MB = 300


def write_recipe(folder: Path, models: Sequence[Path]) -> Path:
    experts = [{"source_model": model.name, "positive_prompts": [model.name]} for model in models]
    recipe = folder / "moe.yml"
    recipe.write_text(
        json.dumps({"base_model": models[0].name, "gate_mode": "random", "dtype": "bfloat16", "experts": experts})
    )
    return recipe


def report_assembly(folder: Path, size: Size, rounds: int, other: Path | None, other_rounds: int) -> None:
    """Print the time to assemble four experts into a mixture."""
    models = models_of(folder, size, 4)
    if not (models[0] / "tokenizer.json").exists():
        train_tokenizer(["one two three"], 300, models[0], max_length=128)
        for model in models[1:]:
            for file in models[0].glob("tokenizer*"):
                shutil.copy(file, model / file.name)
    recipe = write_recipe(folder, models)
    ours = [sys.executable, "-m", "expertctl.cli.main", "merge", "--config", recipe, "-o", "out", "--quiet"]
    costs = measured(folder, ours, rounds)
    print("| four experts as one mixture, random router | s | peak MB |")
    print("|---|---:|---:|")
    print(f"| expertctl | {costs.seconds:.2f} | {costs.peak_mb:.0f} (at most {WANTED_PEAK_MB}) |", flush=True)
    if other is not None:
        theirs = measured(folder, [other, recipe, "out"], other_rounds)
        print(f"| mergekit-moe | {theirs.seconds:.2f} | {theirs.peak_mb:.0f} |")
        print(f"\nmergekit-moe / expertctl: {theirs.seconds / costs.seconds:.1f} (at least {WANTED_RATIO:g})")


def measured(folder: Path, command: Sequence[str | Path], rounds: int) -> Cost:
    costs = []
    for _ in range(rounds):
        shutil.rmtree(folder / "out", ignore_errors=True)
        costs.append(run(command, folder)[0])
        assert (folder / "out").is_dir(), "nothing was written"
    shutil.rmtree(folder / "out", ignore_errors=True)
    return Cost(statistics.median(cost.seconds for cost in costs), max(cost.peak_mb for cost in costs))


# --- running ---


def blocks(width: int, inner: int, experts: int, top_k: int) -> dict[str, Any]:
    """Return a dense feed-forward layer and the same mixture layer with each implementation, as loaded models have them."""
    import torch
    from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM
    from transformers.models.llama.modeling_llama import LlamaMLP

    from expertctl.core.models.kernels.sorted_loop import use_sorted_loop
    from expertctl.merge.mixture.container import MixtureConfig, MixtureForCausalLM

    one_layer = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 8,
    }
    dense = LlamaConfig(**one_layer)
    models: dict[str, Any] = {}
    for way in ("eager", "grouped_mm", "sorted loop"):
        config = MixtralConfig(**one_layer, num_local_experts=experts, num_experts_per_tok=top_k)
        models[way] = MixtralForCausalLM(config)
    models["sorted loop (container)"] = MixtureForCausalLM(
        MixtureConfig(dense.to_dict(), num_experts=experts, num_experts_per_tok=top_k)
    )
    for name, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        if name.startswith("sorted loop"):
            use_sorted_loop(model)
        else:
            model.set_experts_implementation(name)
    modules = {
        "dense": LlamaMLP(dense),
        "not routed": in_equal_shares([LlamaMLP(dense) for _ in range(experts)]),
    }
    for name, model in models.items():
        network = model.network if isinstance(model, MixtureForCausalLM) else model
        modules[name] = network.model.layers[0].mlp
    return modules


def in_equal_shares(experts: Sequence[Any]) -> Any:
    """Return a module that sends equal, consecutive shares of the rows through each layer."""
    import torch

    class EqualShares(torch.nn.ModuleList):
        def forward(self, x_1Nd: torch.Tensor) -> torch.Tensor:
            shares = x_1Nd.chunk(len(self), dim=1)
            return torch.cat([expert(share) for expert, share in zip(self, shares, strict=True)], dim=1)

    return EqualShares(experts)


def seconds_of(block: Any, x: Any, *, backward: bool) -> float:
    import torch

    x = x.clone().requires_grad_(backward)  # as within a network, whose earlier layers want its gradient
    begin = time.process_time()
    if backward:
        block(x).sum().backward()
        block.zero_grad(set_to_none=True)
    else:
        with torch.inference_mode():
            block(x)
    return time.process_time() - begin


def report_running(
    width: int, inner: int, tokens: Sequence[int], shapes: Sequence[tuple[int, int]], rounds: int
) -> None:
    """Print the speed of mixture layers relative to a dense layer with the same active operations."""
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()  # as the processes that train do
    print(f"\nOne layer of width {width}, inner width {inner}\n")
    ways = ("not routed", "eager", "grouped_mm", "sorted loop", "sorted loop (container)")
    print(f"| tokens | experts, top k | pass | {' | '.join(ways)} |")
    print("|---:|---|---|" + "---:|" * len(ways))
    for count in tokens:
        for experts, top_k in shapes:
            torch.manual_seed(0)
            modules = blocks(width, inner, experts, top_k)
            x, many = torch.randn(1, count, width), torch.randn(1, count * top_k, width)
            for backward in (False, True):
                times: dict[str, list[float]] = {name: [] for name in modules}
                for _ in range(rounds + 1):
                    for name, block in modules.items():
                        given = many if name in ("dense", "not routed") else x
                        times[name].append(seconds_of(block, given, backward=backward))
                medians = {name: statistics.median(spent[1:]) for name, spent in times.items()}
                dense = medians.pop("dense")
                cells = [f"{dense / spent:.2f}" for spent in medians.values()]
                word = "forward and backward" if backward else "forward"
                print(f"| {count} | {experts}, {top_k} | {word} | {' | '.join(cells)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-moe", type=Path, help="mergekit-moe of another environment")
    parser.add_argument("--mergekit-rounds", type=at_least(1), default=3)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--hidden", type=at_least(1), default=1024)
    parser.add_argument("--layers", type=at_least(1), default=12)
    parser.add_argument("--vocabulary", type=at_least(1), default=32000)
    parser.add_argument(
        "--layers-timed",
        type=pair_of("WIDTH", "INNER"),
        nargs="*",
        default=[(256, 704), (576, 1536)],
        metavar="WIDTH,INNER",
        help="hidden and inner widths of the timed layers; the second default is that of a 135-million-parameter model",
    )
    parser.add_argument("--tokens", type=at_least(1), nargs="*", default=[1024, 2048])
    parser.add_argument(
        "--shapes",
        type=pair_of("EXPERTS", "TOP_K"),
        nargs="*",
        default=[(4, 1), (4, 2), (8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4)],
        metavar="EXPERTS,TOP_K",
    )
    parser.add_argument("--layer-rounds", type=at_least(1), default=15)
    parser.add_argument("--folder", type=Path, help="folder for the checkpoints; default: a temporary folder")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        size = Size(given.hidden, given.layers, given.vocabulary)
        report_assembly(folder, size, given.rounds, given.mergekit_moe, given.mergekit_rounds)
        for width, inner in given.layers_timed:
            report_running(width, inner, given.tokens, given.shapes, given.layer_rounds)


if __name__ == "__main__":
    main()
