"""Building a memory: the keys of a model on the training text of domains, with the token behind each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ...core.artefacts.digests import digest_of_tokenizer, sha256_of_file
from ...core.artefacts.files import exclusive, new_folder, os_errors_as_user_errors, refuse_existing, require_space
from ...core.artefacts.layout import Layout, check_name, require_free
from ...core.artefacts.versions import tool_versions
from ...core.config.settings import ProjectConfig
from ...core.errors import UserError
from ...core.manifests.manifest import Manifest, Parent, read_manifest
from ...core.models.adapters.prompts import refuse_prompt
from ...core.models.decoding.memories.indexing import resolve_index, write_index
from ...core.models.decoding.memories.keys import KeyReader, key_kind
from ...core.models.decoding.memories.manifest import (
    KEYS_FILE,
    VALUES_FILE,
    MemoryManifest,
    function_digest,
    read_memory,
    require_memory_of,
)
from ...core.models.loading import has_own_class, load_network, require_intact_models, text_positions, tokenizer_folder
from ...core.process.compute import best_device
from ...core.reporting import SILENT, Reporter
from ...core.text.conversation_blocks import windows_of
from ...core.text.token_store import TokenWindows
from ..measures.evaluation import window_length
from ..text.corpora import PreparedDomain, domain_config, prepare_domain
from .fitting import fit_interpolation
from .reading import batch_size, read_windows
from .settings import DEFAULT_K, FIT_TOKENS, BuildSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_memory(
    layout: Layout,
    project: ProjectConfig,
    name: str,
    domains: Sequence[str],
    model: str,
    settings: BuildSettings,
    *,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> MemoryManifest:
    """Build `memories/NAME` from the training part of domains and return its manifest.

    Keys are streamed to disk. Raises `UserError` for a model that is not one dense transformer, a taken name, a context that
    leaves no keys, and domains without text that counts.
    """
    target = layout.memories / check_name(name, "a memory")
    require_free(layout, name, target)
    folder = layout.artefact(model)
    manifest = require_dense(folder)
    refuse_existing(target, force=force, what="memory")
    window, context = _window(layout, model, folder, settings.context)
    tokenizer = tokenizer_folder(folder)
    prepared = {
        domain: prepare_domain(layout, domain, domain_config(project, domain), tokenizer, reporter=reporter)
        for domain in dict.fromkeys(domains)
    }
    if not prepared:
        raise UserError("a memory needs text; name domains with --domains")
    require_intact_models([folder])
    network = load_network(folder, dtype="float32").to(best_device())
    kind = key_kind(network)
    with (
        exclusive(layout.lock(f"memory-{name}"), f"memory '{name}'", patience_s=0.5),
        new_folder(target, force=force, what="memory") as partial,
    ):
        texts = {domain: windows_of(text.open("train"), window, window - context) for domain, text in prepared.items()}
        counts, width = _write_keys(partial, network, KeyReader(network, kind), texts, reporter)
        total = sum(counts.values())
        record = resolve_index(settings.index, settings.codes, total, width, reporter)
        keys = np.memmap(partial / KEYS_FILE, dtype="<f2", mode="r", shape=(total, width))
        write_index(partial, keys, record, reporter)
        memory = MemoryManifest(
            kind="memory",
            name=name,
            model=Parent.of(manifest, manifest.name),
            function=function_digest(folder),
            tokenizer=digest_of_tokenizer(tokenizer),
            domains={domain: text.statement() for domain, text in prepared.items()},
            domain_keys=counts,
            keys=total,
            width=width,
            key=kind,
            window=window,
            context=context,
            index=record,
            files={path.name: sha256_of_file(path) for path in sorted(partial.iterdir())},
            versions=tool_versions(),
        )
        memory.write(partial)
        if settings.fit:
            fitted = fit_interpolation(
                network,
                [partial],
                validation_texts(prepared, window, window - context),
                settings.k,
                settings.fit_tokens,
                reporter,
            )
            memory = replace(memory, fit=fitted)
            memory.write(partial)
    return memory


def require_dense(folder: Path) -> Manifest:
    """Return the manifest of a model that is one dense transformer; raises `UserError` with the reason for another."""
    manifest = read_manifest(folder)
    merged = manifest.merged
    reason = None
    if merged is not None and merged.kind in ("ensemble", "moe", "stitched"):
        reason = {
            "ensemble": "an ensemble of several transformers, which have keys of their own",
            "moe": "a mixture of experts, whose keys would change with every expert that joins or leaves",
            "stitched": "several stitched transformers, which have keys of their own",
        }[merged.kind]
    elif manifest.kind != "expert" and has_own_class(folder):
        reason = "not a model of transformers"
    if reason is not None:
        raise UserError(
            f"no memory can be built with '{manifest.name}': it is {reason}; use the seed, an expert or an average"
        )
    refuse_prompt(folder, "memories")
    return manifest


def validation_texts(prepared: Mapping[str, PreparedDomain], window: int, stride: int) -> dict[str, TokenWindows]:
    """Return the windows of the validation part of domains."""
    return {domain: windows_of(text.open("valid"), window, stride) for domain, text in prepared.items()}


def _window(layout: Layout, model: str, folder: Path, context: int | None) -> tuple[int, int]:
    """Return the tokens of a window, and the least number of tokens before a key."""
    window = window_length(layout, model, folder, None)
    chosen = window // 2 if context is None else context
    if chosen >= window:
        positions = text_positions(folder)
        if context is None or context >= positions:
            raise UserError(f"--context {chosen} leaves no keys in the {positions} positions of {model}; give less")
        window = min(positions, 2 * context)
    return window, chosen


def _write_keys(
    folder: Path, model: PreTrainedModel, reader: KeyReader, texts: Mapping[str, TokenWindows], reporter: Reporter
) -> tuple[dict[str, int], int]:
    """Append the keys and tokens of all domains to files; return the number of keys of each, and their width."""
    counts: dict[str, int] = {}
    width, done, total = 0, 0, sum(map(len, texts.values()))
    with ExitStack() as files, os_errors_as_user_errors(folder):
        keys_file = files.enter_context((folder / KEYS_FILE).open("wb"))
        values_file = files.enter_context((folder / VALUES_FILE).open("wb"))
        for domain, windows in texts.items():
            counts[domain] = 0
            for batch in windows.batches(batch_size(model, windows)):
                keys, _, tokens = read_windows(model, reader, batch)
                if not width:
                    width = keys.shape[1]
                    require_space(folder, (2 * width + 4) * sum(text.num_targets for text in texts.values()))
                keys_file.write(_half(keys).tobytes())
                values_file.write(tokens.astype("<i4").tobytes())
                counts[domain] += len(tokens)
                done += len(batch.tokens)
                reporter.progress(f"keys of {domain}", done, total, "windows")
            if not counts[domain]:
                raise UserError(
                    f"no token of the training text of domain '{domain}' counts, so it has no keys; leave it out"
                )
    return counts, width


def _half(keys: torch.Tensor) -> NDArray[np.float16]:
    """Return keys in float16; raises `UserError` for numbers that it cannot hold."""
    half: NDArray[np.float16] = keys.numpy().astype("<f2")
    if not np.isfinite(half).all():
        raise UserError(
            "keys of this model have numbers beyond float16, so that distances would be infinite; use another model"
        )
    return half


def fit_memory(
    layout: Layout,
    project: ProjectConfig,
    name: str,
    domains: Sequence[str] | None = None,
    *,
    k: int = DEFAULT_K,
    tokens: int = FIT_TOKENS,
    reporter: Reporter = SILENT,
) -> MemoryManifest:
    """Fit a memory's weight and temperature on the validation part of domains (default: its own); returns its manifest.

    Raises `UserError` if the model that made its keys is not in the workspace, and for what `build_memory` refuses.
    """
    folder = layout.memory(name)
    folder_of_model = layout.artefact(read_memory(folder).model.name)
    memory = require_memory_of(folder, folder_of_model)
    require_intact_models([folder_of_model])
    names = tuple(domains) if domains else tuple(memory.domains)
    tokenizer = tokenizer_folder(folder_of_model)
    prepared = {
        domain: prepare_domain(layout, domain, domain_config(project, domain), tokenizer, reporter=reporter)
        for domain in dict.fromkeys(names)
    }
    network = load_network(folder_of_model, dtype="float32").to(best_device())
    texts = validation_texts(prepared, memory.window, memory.window - memory.context)
    with exclusive(layout.lock(f"memory-{memory.name}"), f"memory '{memory.name}'", patience_s=0.5):
        fitted = replace(memory, fit=fit_interpolation(network, [folder], texts, k, tokens, reporter))
        fitted.write(folder)
    return fitted
