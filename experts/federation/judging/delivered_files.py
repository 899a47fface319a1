"""Checks of a delivered expert's files: names and sizes, the manifest, and everything that it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ....core.artefacts.digests import MANIFEST_NAMES
from ....core.artefacts.files import read_json
from ....core.artefacts.safetensors_io import SINGLE_FILE, header_bytes
from ....core.errors import UserError, first_line
from ....core.manifests.manifest import Manifest, read_manifest
from ....core.manifests.run import RUN_FILE, read_run
from ....core.manifests.verification import verify
from ....core.models.adapters.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ...runs.trainable import makes_adapter
from ..protocol.delivery import MAX_HEADER, MAX_TEXT, SignedStatement, Statement
from ..protocol.requests import ExpertRequest
from .refusal import RefusalCode, Refused

MAX_JSON = 1 << 20
"""Largest manifest and run file, in bytes."""
LARGEST_METRIC = 1e15
SIZE_SLACK = 64 << 20
"""Bytes by which an expert may exceed the seed."""


def check_announced_files(statement: Statement, request: ExpertRequest) -> None:
    """Check names and sizes of the files that a statement announces, before any of them is sent; raises `Refused`."""
    sizes = {file.name: file.size for file in statement.files}
    tensors = {name for name in sizes if name.endswith(".safetensors")}
    is_adapter = makes_adapter(request.recipe.trains)
    documents = {RUN_FILE, MANIFEST_NAMES["expert"], *([ADAPTER_CONFIG] if is_adapter else [])}
    if _main_file(request) not in sizes or sizes.keys() - tensors != documents:
        raise Refused(RefusalCode.FILES, ", ".join(sizes)[:200])
    largest = max(sizes[name] for name in documents)
    if largest > MAX_JSON:
        raise Refused(RefusalCode.TOO_LARGE, f"a manifest of {largest:,} bytes; {MAX_JSON:,} are allowed")
    total, seed_bytes = sum(sizes.values()), sum(file.size for file in request.seed_files)
    if total > seed_bytes + SIZE_SLACK:
        raise Refused(RefusalCode.TOO_LARGE, f"{total:,} bytes; the seed has {seed_bytes:,}")


def _main_file(request: ExpertRequest) -> str:
    """Return the file that every delivery for a request has: the changed tensors, or the adapter."""
    return ADAPTER_WEIGHTS if makes_adapter(request.recipe.trains) else SINGLE_FILE


def checked_manifest(
    folder: Path, signed: SignedStatement, request: ExpertRequest, seed: Manifest, side_files: Mapping[str, Any]
) -> Manifest:
    """Return the manifest of a delivery whose files match it and the request; raises `Refused`."""
    tensors = {file.name for file in signed.statement.files if file.name.endswith(".safetensors")}
    expected_files = {_main_file(request), *side_files}
    if tensors != expected_files:
        raise Refused(
            RefusalCode.FILES, f"{', '.join(sorted(tensors))}; {', '.join(sorted(expected_files))} belong there"
        )
    for name in tensors:
        _check_header(folder / name)
    try:
        problems = verify(folder)
        manifest, run = read_manifest(folder), read_run(folder)
        texts = [*_texts(read_json(folder / MANIFEST_NAMES["expert"])), *_texts(read_json(folder / RUN_FILE))]
    except (UserError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise Refused(RefusalCode.DIGEST, first_line(error).replace(str(folder), "the delivery")) from None
    if problems:
        raise Refused(RefusalCode.DIGEST, problems[0])
    if any(len(text) > MAX_TEXT or not text.isprintable() for text in texts):
        raise Refused(RefusalCode.MANIFEST, f"a text is longer than {MAX_TEXT} letters, or cannot be printed")
    if not all(map(_is_metric, manifest.metrics.values())):
        raise Refused(RefusalCode.MANIFEST, "a metric is not a finite number")
    statement, owner, trains = signed.statement, request.owner, request.recipe.trains
    entries = {
        "kind": (manifest.kind, "expert"),
        "owner": (manifest.owner, owner),
        "name": (manifest.name, owner),
        "domains": ([*manifest.domains, *manifest.data.annealing], [owner]),
        "parents": ([(parent.kind, parent.digest) for parent in manifest.parents], [("seed", request.seed)]),
        "tokenizer": (manifest.tokenizer, seed.tokenizer),
        "trainer": (manifest.trainable, trains),
        "digest": (manifest.digest, statement.expert),
        "data": (manifest.data, statement.data),
        "privacy": (manifest.data.privacy, statement.privacy),
        "start": ((run.base, set(run.start)), (None, {"seed"})),
        "run": ((run.kind, run.name, run.owner, run.trains, run.domains), ("expert", owner, owner, trains, (owner,))),
        "experts": (dict(manifest.expert_data), {}),
    }
    for name, (value, expected) in entries.items():
        if value != expected:
            raise Refused(RefusalCode.MANIFEST, f"{name} is {value!r:.100}")
    return manifest


def _check_header(path: Path) -> None:
    """Bound the header of a safetensors file, which is parsed as a whole."""
    if (size := header_bytes(path)) > MAX_HEADER:
        raise Refused(
            RefusalCode.TOO_LARGE, f"the header of {path.name} has {size:,} bytes; {MAX_HEADER:,} are allowed"
        )


def _texts(content: Any) -> Iterator[str]:
    """Yield all keys and texts of a JSON document."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield str(key)
            yield from _texts(value)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value)


def _is_metric(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(not isinstance(inner, Mapping) and _is_metric(inner) for inner in value.values())
    return isinstance(value, int | float) and -LARGEST_METRIC <= value <= LARGEST_METRIC  # false for NaN
