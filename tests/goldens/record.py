"""Digests of what every method makes from fixed inputs, to show that a refactoring changes no result.

    python tests/goldens/record.py --record tests/goldens/digests.json     # before the change
    python tests/goldens/record.py --compare tests/goldens/digests.json    # after it: exit status 1 on a difference

The commands run in processes of their own, in a temporary folder, on one thread. Inputs are the Python standard library's own
text, so digests agree only on the same Python, torch and type of processor; the file says which it was made on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

SCRATCH = ("--set", "batch_size=4", "--set", "sequence_length=64")
DATA_FREE_METHODS = [
    "arcee_fusion",
    "average",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "ram",
    "ramplus_tl",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
]
ONE_EXPERT = {"arcee_fusion", "nearswap"}
TWO_EXPERTS = {"nuslerp", "slerp"}
OPTIONS = {
    "slerp": ["t=0.3"],
    "nearswap": ["t=0.001"],
    "nuslerp": [],
    "dare_linear": ["density=0.5"],
    "dare_ties": ["density=0.5"],
    "ties": ["density=0.3"],
}
MERGEKIT_FILES = ("linear", "passthrough", "slerp")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--record", type=Path, metavar="FILE", help="write the digests there")
    action.add_argument("--compare", type=Path, metavar="FILE", help="compare with the digests there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there and leave the files")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="goldens-"))
    try:
        digests = dict(all_digests(folder))
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    if options.record:
        options.record.write_text(
            json.dumps({"machine": machine(), "digests": digests}, indent=1) + "\n", encoding="utf-8"
        )
        return 0
    return compare(json.loads(options.compare.read_text(encoding="utf-8")), digests)


def machine() -> dict[str, str]:
    """Return what the last bits of a result depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "scikit-learn")},
    }


def compare(recorded: dict[str, dict[str, str]], digests: dict[str, str]) -> int:
    if recorded["machine"] != machine():
        print(
            f"recorded on {recorded['machine']},\nthis is     {machine()}: digests may differ",
            file=sys.stderr,
        )
    names = sorted(recorded["digests"].keys() | digests.keys())
    different = [name for name in names if recorded["digests"].get(name) != digests.get(name)]
    for name in different:
        print(f"differs: {name}")
    print(f"{len(names) - len(different)} of {len(names)} equal")
    return 1 if different else 0


def all_digests(folder: Path) -> Iterator[tuple[str, str]]:
    workspace = folder / "workspace"
    run(folder, "quickstart", workspace.name, "--tokens", "120000")
    yield from artefacts(workspace, "quickstart", "seed", "experts/*", "generalists/*")
    yield from dense_merges(workspace)
    yield from other_generalists(workspace)
    yield from mixtures(workspace)
    yield from stitched(workspace)
    yield from special_runs(workspace)
    yield from mergekit_files(folder)
    report = json.loads(run(folder, "--json", "federate", "simulate", "--owners", "60", "--seed", "3"))
    measured = {"cpu_seconds", "seconds", "peak_memory_bytes", "events_per_second"}
    kept = {key: value for key, value in report.items() if key not in measured}
    yield "simulated federation", sha256([json.dumps(kept, sort_keys=True).encode()])


def dense_merges(workspace: Path) -> Iterator[tuple[str, str]]:
    for method in DATA_FREE_METHODS:
        experts = "cpp" if method in ONE_EXPERT else "cpp,python" if method in TWO_EXPERTS else "cpp,manual,python"
        options = [word for option in OPTIONS.get(method, []) for word in ("--option", option)]
        weights = [] if method in ONE_EXPERT | TWO_EXPERTS | {"model_stock"} else ["--weights", weights_of(experts)]
        run(workspace, "merge", f"m-{method}", "--method", method, "--experts", experts, *weights, *options)
    for kind, method in (("gram", "regmean"), ("fisher", "fisher")):
        run(workspace, "stats", "cpp", "python", "--kind", kind, "--samples", "16")
        run(workspace, "merge", f"m-{method}", "--method", method, "--experts", "cpp,python")
    run(workspace, "merge", "m-halves", "--method", "ties", "--experts", "cpp,python", "--dtype", "bfloat16")
    run(workspace, "merge", "m-searched", "--method", "average", "--search", "--trials", "6")
    yield from artefacts(workspace, "merge", "generalists/m-*")


def weights_of(experts: str) -> str:
    return ",".join(f"{name}:{weight}" for name, weight in zip(experts.split(","), (0.5, 0.3, 0.2), strict=False))


def other_generalists(workspace: Path) -> Iterator[tuple[str, str]]:
    run(workspace, "merge", "g-top1", "--method", "ensemble", "--option", "top_k=1")
    table = json.loads(run(workspace, "--json", "eval", "ensemble", "g-top1", "uniform-average"))
    yield "evaluation", sha256([json.dumps(table, sort_keys=True).encode()])
    text = run(workspace, "--json", "generate", "ensemble", "def main(", "--max-new-tokens", "12")
    yield "generation", sha256([json.dumps(json.loads(text)["text"]).encode()])
    run(workspace, "extract-adapter", "python", "--base", "seed", "-o", "adapter", "--rank", "4")
    yield "adapter", digest_of_folder(workspace / "adapter")
    run(workspace, "data", "discover", "topics", "--clusters", "3", "--sample", "400")
    run(workspace, "branch", "--clusters", "topics", "--tokens", "3000", *SCRATCH)
    run(workspace, "train", "topics-0", "topics-1", "topics-2")
    run(
        *(
            workspace,
            "merge",
            "g-clusters",
            "--method",
            "ensemble",
            "--experts",
            "topics-0,topics-1,topics-2",
        ),
        *("--option", "mixer=clusters"),
    )
    yield from artefacts(workspace, "clusters", "experts/topics-*", "generalists/g-*")


def mixtures(workspace: Path) -> Iterator[tuple[str, str]]:
    run(workspace, "merge", "x-btx", "--method", "btx", "--experts", "cpp,python")
    run(workspace, "tune", "x-btx-tuned", "--from", "x-btx", "--trains", "mixture", *DOMAINS, *TUNING)
    for name in ("cpp", "python"):
        run(workspace, "branch", f"ff-{name}", "--domain", name, "--trains", "feed_forward", *TUNING)
        run(workspace, "branch", f"fx-{name}", "--domain", name, "--trains", "flexolmo", *TUNING)
    run(workspace, "train", "ff-cpp", "ff-python", "fx-cpp", "fx-python")
    for router in ("hidden", "random", "uniform"):
        run(
            *(workspace, "merge", f"x-{router}", "--method", "mixture", "--experts", "ff-cpp,ff-python"),
            *("--option", f"router={router}"),
        )
    run(workspace, "merge", "x-flexolmo", "--method", "flexolmo", "--experts", "fx-cpp,fx-python")
    run(workspace, "tune", "x-routed", "--from", "x-flexolmo", "--trains", "router", *DOMAINS, *TUNING)
    run(workspace, "expert", "remove", "fx-cpp", "-m", "x-flexolmo", "-o", "x-left")
    run(workspace, "expert", "add", "fx-cpp", "-m", "x-left", "-o", "x-joined")
    yield from artefacts(workspace, "mixture", "experts/f?-*", "generalists/x-*")


DOMAINS = ("--domains", "cpp,python")
TUNING = ("--tokens", "3000", *SCRATCH)


def stitched(workspace: Path) -> Iterator[tuple[str, str]]:
    run(workspace, "merge", "s-stitched", "--method", "stitch", "--experts", "cpp,python", "--self-contained")
    run(workspace, "tune", "s-tuned", "--from", "s-stitched", "--trains", "stitches", *DOMAINS, *TUNING)
    yield from artefacts(workspace, "stitched", "generalists/s-*")


def special_runs(workspace: Path) -> Iterator[tuple[str, str]]:
    run(
        workspace,
        "branch",
        "p-private",
        "--domain",
        "python",
        "--dp",
        "epsilon=8,delta=1e-5,noise=seeded",
        *TUNING,
    )
    run(workspace, "train", "p-private")
    run(workspace, "tune", "d-demix", "--from", "seed", "--trains", "demix", *DOMAINS, *TUNING)
    run(workspace, "baseline", "dense")
    yield from artefacts(workspace, "special", "experts/p-*", "generalists/d-*", "baselines/*")


def mergekit_files(folder: Path) -> Iterator[tuple[str, str]]:
    models = shutil.copytree(Path(__file__).parent / "mergekit", folder / "mergekit")
    for name in MERGEKIT_FILES:
        run(models, "merge", "--config", f"{name}.yml", "-o", f"merged-{name}")
        yield f"mergekit {name}", digest_of_folder(models / f"merged-{name}")


def run(folder: Path, *words: str) -> str:
    """Run a command in a folder, stop if it fails, and return what it printed."""
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "EXPERTCTL_PLUGINS": ""}
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "expertctl.cli.main", *words],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}: exit status {done.returncode}\n{done.stderr}")
    print(f"{time.monotonic() - began:6.1f} s  {' '.join(words)}", file=sys.stderr, flush=True)
    return done.stdout


def artefacts(workspace: Path, title: str, *patterns: str) -> Iterator[tuple[str, str]]:
    """Yield (name, digest) of the artefacts whose folders match, relative to the workspace."""
    folders = {path for pattern in patterns for path in workspace.glob(pattern) if path.is_dir()}
    if not folders:
        sys.exit(f"nothing at {patterns}")
    for path in sorted(folders):
        yield f"{title}: {path.relative_to(workspace).as_posix()}", digest_of_folder(path)


def digest_of_folder(folder: Path) -> str:
    """Return the digest of the names and bytes of all tensors in a folder, and of its config.json."""
    import torch
    from safetensors import safe_open

    lines = []
    for path in sorted(folder.rglob("*.safetensors")):
        if any(part.startswith(".") or part == "training" for part in path.relative_to(folder).parts):
            continue
        with safe_open(path, framework="pt") as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name).contiguous()
                content = tensor.flatten().view(torch.uint8).numpy().tobytes()
                place = path.parent.relative_to(folder).as_posix()
                lines.append(f"{place} {name} {tensor.dtype} {tuple(tensor.shape)} {sha256([content])}".encode())
    config = folder / "config.json"
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        lines.append(json.dumps(content, sort_keys=True).encode())
    if not lines:
        sys.exit(f"{folder} holds neither tensors nor config.json")
    return sha256(lines)


def sha256(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(b"%d:" % len(piece) + piece)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
