"""Making the index of a memory with faiss, from keys on disk in pieces. Shapes: N = keys, d = width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....artefacts.files import os_errors_as_user_errors
from ....errors import UserError
from ....reporting import SILENT, Reporter
from .manifest import INDEX_FILE, Codes, IndexKind, IndexRecord
from .search import has_faiss

FEW_KEYS = 100_000
"""Up to so many keys, all are compared unless an index is asked for."""
KEYS_AT_ONCE = 1 << 16
PROBES = 48
LISTS_PER_ROOT = 4
"""Lists for each unit of the square root of the number of keys: 4,096 for a million."""
SAMPLES_PER_LIST = 48
PQ_DIMENSIONS = 2
"""Numbers of a key that four bits of product quantisation stand for."""
LEAST_PQ_KEYS = 1024


def resolve_index(
    kind: IndexKind | None, codes: Codes | None, keys: int, width: int, reporter: Reporter = SILENT
) -> IndexRecord:
    """Return the index for a number of keys; raises `UserError` for one that needs faiss, which is not installed."""
    asked = kind is not None or codes is not None
    if not has_faiss():
        if kind == "ivf" or codes not in (None, "float16"):
            raise UserError(
                f"an index of kind '{kind or 'exact'}' with codes '{codes or 'int8'}' needs faiss: pip install 'expertctl[memory]'"
            )
        if not asked and keys > FEW_KEYS:
            reporter.say(
                f"faiss is not installed, so all {keys:,} keys are compared; pip install 'expertctl[memory]' and build again"
            )
        return IndexRecord("exact")
    chosen = kind or ("ivf" if keys > FEW_KEYS else "exact")
    chosen_codes = codes or ("int8" if chosen == "ivf" else "float16")
    if chosen_codes == "pq" and (width % (2 * PQ_DIMENSIONS) or keys < LEAST_PQ_KEYS):
        raise UserError(
            f"codes 'pq' need at least {LEAST_PQ_KEYS:,} keys of a width that is a multiple of {2 * PQ_DIMENSIONS}, and these are "
            f"{keys:,} of width {width}; use int8"
        )
    bytes_of_code = {"float16": 2 * width, "int8": width, "pq": width // (2 * PQ_DIMENSIONS)}[chosen_codes]
    if chosen == "exact":
        return IndexRecord("exact", chosen_codes, code_bytes=None if chosen_codes == "float16" else bytes_of_code)
    lists = max(min(round(LISTS_PER_ROOT * math.sqrt(keys)), keys // 39), 1)
    return IndexRecord("ivf", chosen_codes, lists, min(PROBES, lists), bytes_of_code)


def write_index(folder: Path, keys_Nd: NDArray[np.float16], record: IndexRecord, reporter: Reporter = SILENT) -> None:
    """Train an index on a sample of keys, add all of them and write it, if there is one.

    The codes of all keys are in memory until it is written.
    """
    if record.kind == "exact" and record.codes == "float16":
        return
    import faiss

    codes = {"float16": "SQfp16", "int8": "SQ8", "pq": f"PQ{keys_Nd.shape[1] // PQ_DIMENSIONS}x4fs"}[record.codes]
    lists, residual = "", ""
    if record.kind == "ivf":
        lists = f"IVF{record.lists},"
        residual = "r" if record.codes == "pq" else ""  # codes of what the centroid leaves
    index: Any = faiss.index_factory(keys_Nd.shape[1], lists + codes + residual, faiss.METRIC_L2)
    reporter.progress("training the index", 0, 1)
    index.train(_sample(keys_Nd, max(SAMPLES_PER_LIST * (record.lists or 0), 20_000)))
    for begin, keys in _pieces(keys_Nd):
        index.add(keys)
        reporter.progress("indexing", min(begin + len(keys), len(keys_Nd)), len(keys_Nd), "keys")
    with os_errors_as_user_errors(folder):
        faiss.write_index(index, str(folder / INDEX_FILE))


def _sample(keys_Nd: NDArray[np.float16], count: int) -> NDArray[np.float32]:
    """Return evenly spaced keys in float32."""
    count = min(count, len(keys_Nd))
    return keys_Nd[np.arange(count) * len(keys_Nd) // count].astype(np.float32)


def _pieces(keys_Nd: NDArray[np.float16]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for begin in range(0, len(keys_Nd), KEYS_AT_ONCE):
        yield begin, keys_Nd[begin : begin + KEYS_AT_ONCE].astype(np.float32)
