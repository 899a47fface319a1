"""Search among the keys of a memory: recall and time of indexes, against the exact search of the same keys.

The keys are drawn: clusters with sizes of Zipf's law, whose centres and members vary most in a few directions, as hidden states
do; queries are drawn like keys. `--memory DIR` takes those of a built memory instead, and leaves out the queries' own.

python examples/benchmarks/knn_search.py --keys 1000000
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from whole_numbers import at_least

from expertctl.core.manifests.manifest import Parent
from expertctl.core.models.decoding.memories.indexing import resolve_index, write_index
from expertctl.core.models.decoding.memories.manifest import (
    INDEX_FILE,
    KEYS_FILE,
    VALUES_FILE,
    IndexRecord,
    MemoryManifest,
    read_memory,
)
from expertctl.core.models.decoding.memories.search import Datastore

PIECE = 1 << 16


def draw(count: int, width: int, clusters: int, seed: int, *, text: int) -> np.ndarray:
    """Return keys in float16, (count, width); `seed` draws the clusters, `text` the members."""
    random = np.random.default_rng(seed)
    scale = 1 / np.sqrt(1 + np.arange(width))
    scale *= np.sqrt(width / (scale**2).sum())
    centres = (random.standard_normal((clusters, width)) * scale).astype(np.float32)
    weights = 1 / (1 + np.arange(clusters))
    random = np.random.default_rng([seed, text])
    keys = np.empty((count, width), dtype=np.float16)
    for begin in range(0, count, PIECE):
        piece = keys[begin : begin + PIECE]
        members = random.choice(clusters, len(piece), p=weights / weights.sum())
        noise = random.standard_normal(piece.shape, dtype=np.float32) * (0.5 * scale.astype(np.float32))
        piece[:] = centres[members] + noise
    return keys


def write_memory(folder: Path, keys: np.ndarray, index: IndexRecord) -> None:
    """Write a memory without a model, but for its index."""
    folder.mkdir()
    keys.tofile(folder / KEYS_FILE)
    np.zeros(len(keys), dtype=np.int32).tofile(folder / VALUES_FILE)
    parent = Parent("seed", "none", "")
    counts: dict[str, Any] = {"keys": len(keys), "width": keys.shape[1], "window": 1, "context": 0}
    names: dict[str, Any] = {"kind": "memory", "name": folder.name, "model": parent, "function": "", "tokenizer": ""}
    MemoryManifest(
        **names, **counts, domains={}, domain_keys={}, key="final_hidden_state", index=index, files={}
    ).write(folder)


def timed(store: Datastore, queries: torch.Tensor, k: int, batch: int) -> tuple[torch.Tensor, float]:
    """Return the distances of neighbours and the seconds per query, with so many queries at once."""
    store.search(queries[:batch], k)  # keys are read from disk once
    begin = time.perf_counter()
    found = [store.search(part, k).distances for part in torch.split(queries, batch)]
    return torch.cat(found), (time.perf_counter() - begin) / len(queries)


def recall(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the share of places with a distance of at most the exact k-th."""
    return float((found <= exact[:, -1:] * (1 + 1e-5)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=at_least(1), default=1_000_000)
    parser.add_argument("--width", type=at_least(1), default=128)
    parser.add_argument("--clusters", type=at_least(1), default=20_000)
    parser.add_argument("--queries", type=at_least(1), default=512)
    parser.add_argument("--k", type=at_least(1), default=64)
    parser.add_argument("--codes", default="float16,int8,pq")
    parser.add_argument("--probes", type=at_least(1), help="default: that of the index")
    parser.add_argument("--memory", type=Path, help="folder of a memory, whose keys are used")
    given = parser.parse_args()
    if given.memory is not None:
        manifest = read_memory(given.memory)
        all_keys = np.memmap(given.memory / KEYS_FILE, np.float16, "r", shape=(manifest.keys, manifest.width))
        chosen = np.random.default_rng(0).permutation(manifest.keys)
        keys, asked = all_keys[np.sort(chosen[given.queries :])], all_keys[chosen[: given.queries]]
        source = f"keys of {manifest.model.name}"
    else:
        keys = draw(given.keys, given.width, given.clusters, 0, text=0)
        asked = draw(given.queries, given.width, given.clusters, 0, text=1)
        source = f"{given.clusters:,} clusters"
    queries = torch.from_numpy(asked.astype(np.float32))
    print(f"{len(keys):,} keys of width {keys.shape[1]} ({source}), {len(queries)} queries, k {given.k}, ", end="")
    print(f"{torch.get_num_threads()} thread(s), {keys.nbytes / 1e6:.0f} MB of keys on disk")
    print(
        "| index | lists | probes | build s | index MB | recall | ms a query, together | faster | ms, alone | faster |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        few = queries[: max(len(queries) // 16, 1)]
        write_memory(Path(root) / "exact", keys, IndexRecord("exact"))
        store = Datastore(Path(root) / "exact")
        exact, together = timed(store, queries, given.k, len(queries))
        _, alone = timed(store, few, given.k, 1)
        print(f"| exact | | | | | 1.000 | {together * 1e3:.3f} | | {alone * 1e3:.3f} | |", flush=True)
        for codes in given.codes.split(","):
            record = resolve_index("ivf", codes, len(keys), keys.shape[1])
            folder = Path(root) / codes
            begin = time.perf_counter()
            write_memory(folder, keys, record)
            write_index(folder, keys, record)
            build = time.perf_counter() - begin
            store = Datastore(folder, probes=given.probes)
            found, own = timed(store, queries, given.k, len(queries))
            _, own_alone = timed(store, few, given.k, 1)
            size = (folder / INDEX_FILE).stat().st_size / 1e6
            row = f"| ivf, {codes} | {record.lists} | {given.probes or record.probes} | {build:.1f} | {size:.1f} "
            row += f"| {recall(found, exact):.3f} | {own * 1e3:.3f} | {together / own:.1f}x "
            print(f"{row}| {own_alone * 1e3:.3f} | {alone / own_alone:.1f}x |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    print(f"peak memory of the process: {peak:,.0f} MB, with the drawn keys")


if __name__ == "__main__":
    main()
