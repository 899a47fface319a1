"""Writes the folder of a merged generalist: weights, configuration, tokenizer, card and manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...core.artefacts.digest_cache import digests_of_untouched
from ...core.artefacts.digests import (
    digest_of_file,
    digest_of_tensors,
)
from ...core.artefacts.files import os_errors_as_user_errors, read_json, write_json, write_text
from ...core.artefacts.safetensors_io import DTYPES, Checkpoint, TensorEntry
from ...core.hooks.manager import installed_plugins
from ...core.hooks.merging import MergeMethod
from ...core.manifests.finishing import CARD_FILE, finish_artefact
from ...core.manifests.generalist import ExpertChange, GeneralistConfig, SearchRecord
from ...core.manifests.manifest import Manifest, Parent, read_manifest
from ...core.manifests.statements import DataStatement
from ..engine.calculator import run_merge
from ..engine.writing import fingerprint_of
from ..planning.plan import MergePlan, manifests_of
from ..recipes.recipe import recipe_as_json
from ..sources.licences import licence_of_folder
from ..sources.models import Source
from ..sources.tensor_names import head_name
from ..sources.tokenizers import chat_template, write_tokenizer
from .card import model_card

CHAT_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class Provenance:
    """Manifest entries of a generalist that was made by changing another generalist."""

    parents: tuple[Parent, ...]
    config: GeneralistConfig
    expert_data: Mapping[str, DataStatement]
    licence: str | None


def write_generalist(
    plan: MergePlan,
    folder: Path,
    name: str,
    *,
    provenance: Provenance | None = None,
    fitted_on: Sequence[str] = (),
    search: SearchRecord | None = None,
    history: Sequence[ExpertChange] = (),
    say: Callable[[str], None] = lambda line: None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write a generalist into `folder` and return its manifest; resumes an interrupted merge of the same plan.

    `config.json` is written after the weights, so that an incomplete folder cannot be loaded as a model.
    """
    total = plan.bytes_to_write
    written = run_merge(
        plan.tensor_method,
        plan.shards,
        folder,
        fingerprint=fingerprint_of(plan.identity()),
        vocabulary=plan.vocabulary,
        round_to=plan.recipe.input_dtype,
        settings=plan.settings,
        tell=lambda done: tell(done, total),
    )
    if written.resumed:
        say(f"resuming: {written.resumed} of {len(written.digests)} tensors are already complete")
    write_tokenizer(plan.vocabulary, plan.leading.model_folder, folder)
    _write_chat_template(plan, folder)
    _copy_generation_settings(plan.leading, folder)
    write_config(plan, folder)
    manifest = Manifest(
        kind="generalist",
        name=name,
        parents=provenance.parents if provenance is not None else _parents(plan, written.read),
        config=provenance.config if provenance is not None else describe(plan, fitted_on, search, history),
        expert_data=provenance.expert_data if provenance is not None else _data_statements(plan),
        licence=provenance.licence if provenance is not None else plan.licence,
        versions=_method_version(plan),
    )
    return finish_artefact(folder, manifest, card=model_card, known=written.digests)


def note_evaluation(folder: Path, scores: Mapping[str, Any], verdict: str, holds: bool) -> None:
    """Add an evaluation and the comparison with its baselines to a generalist's manifest and card.

    `scores` is the output of `expertctl eval --json`. Tensors are not changed.
    """
    manifest = read_manifest(folder)
    metrics = {**manifest.metrics, "evaluation": dict(scores), "gate": {"holds": holds, "verdict": verdict}}
    manifest = replace(manifest, metrics=metrics)
    write_text(folder / CARD_FILE, model_card(manifest, scores))
    files = {**manifest.files, CARD_FILE: digest_of_file(folder / CARD_FILE)}
    replace(manifest, files=files).write(folder)


def describe(
    plan: MergePlan,
    fitted_on: Sequence[str] = (),
    search: SearchRecord | None = None,
    history: Sequence[ExpertChange] = (),
) -> GeneralistConfig:
    """Return the resolved configuration of a merge for its manifest."""
    assembly = plan.assembly
    return GeneralistConfig(
        method=plan.method.name,
        kind=plan.method.kind,
        weights=plan.weights(),
        options=_options(plan),
        experts=assembly.experts if assembly is not None else (),
        fitted_on=tuple(fitted_on),
        recipe=recipe_as_json(plan.recipe),
        shard_bytes=plan.shard_bytes,
        mixture=assembly.record if assembly is not None else None,
        search=search,
        history=tuple(history),
    )


def _options(plan: MergePlan) -> dict[str, Any]:
    if plan.assembly is not None:
        return dict(plan.assembly.record.options)
    example = next((tensor for tensor in plan.stack.tensors if tensor.action == "merge"), None)
    return as_options(example.options) if example is not None and example.options is not None else {}


def as_options(options: Any) -> dict[str, Any]:
    """Return options in user syntax: lists for tuples, names without a trailing underscore."""
    return {
        key.rstrip("_"): list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()
    }


def write_config(plan: MergePlan, folder: Path) -> None:
    """Write `config.json`: the leading model's with the changes of the merge; a byte-identical copy if unchanged."""
    source = plan.leading.model_folder / "config.json"
    config = plan.leading.config
    if plan.assembly is not None:
        write_json(folder / "config.json", _assembled_config(plan, plan.assembly.config))
        return
    changed = config | _config_changes(plan, config)
    if changed == config:
        _copy(source, folder / "config.json")
    else:
        write_json(folder / "config.json", changed)


def _assembled_config(plan: MergePlan, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mixture's configuration with the merge's vocabulary and dtype, in the nested `member` if there is one."""
    if "member" in config:
        member = config["member"]
        return {**config, "member": {**member, **_config_changes(plan, member)}}
    return {**config, **_config_changes(plan, config)}


def _config_changes(plan: MergePlan, config: Mapping[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    leading = plan.leading
    old, new = leading.num_layers, len(plan.stack.layers)
    if plan.stack.layers != tuple((plan.stack.layers[0][0], layer) for layer in range(old)):
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if key in config:
                changes[key] = new
        for key, value in config.items():
            if isinstance(value, list) and len(value) == old and key not in changes:  # one entry per layer
                changes[key] = [plan.sources[model].config[key][layer] for model, layer in plan.stack.layers]
    if plan.vocabulary is not None and plan.vocabulary.size != config.get("vocab_size"):
        changes["vocab_size"] = plan.vocabulary.size
    dtype = plan.recipe.dtype or plan.recipe.input_dtype
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        changes[key] = DTYPES[dtype][0]
    untied = any(head_name({tensor.name.removeprefix("network."): tensor}) for tensor in plan.stack.tensors)
    if untied and config.get("tie_word_embeddings", False):
        changes["tie_word_embeddings"] = False
    return changes


def _copy_generation_settings(source: Source, folder: Path) -> None:
    path = source.model_folder / "generation_config.json"
    if path.is_file():
        _copy(path, folder / path.name)


def _write_chat_template(plan: MergePlan, folder: Path) -> None:
    wanted = plan.recipe.chat_template
    if wanted is None:
        return
    text = chat_template(wanted, {name: source.model_folder for name, source in plan.sources.items()})
    if text is not None:
        write_text(folder / CHAT_TEMPLATE_FILE, text)
        config = folder / "tokenizer_config.json"
        if config.is_file() and "chat_template" in (content := read_json(config)):
            write_json(config, content | {"chat_template": text})


def _copy(source: Path, target: Path) -> None:
    """Copy a small file by reading it into memory."""
    with os_errors_as_user_errors(target):
        target.write_bytes(source.read_bytes())


def _parents(plan: MergePlan, read: Mapping[TensorEntry, str]) -> tuple[Parent, ...]:
    weights = plan.weights()
    return tuple(_parent(name, source, read, weights.get(name)) for name, source in plan.sources.items())


def _parent(name: str, source: Source, read: Mapping[TensorEntry, str], weight: float | None) -> Parent:
    if source.manifest is not None:
        return replace(Parent.of(source.manifest, name, weight), kind=source.kind)
    return Parent(source.kind, name, _digest(source, read), weight, licence=licence_of_folder(source.folder))


def _digest(source: Source, read: Mapping[TensorEntry, str]) -> str:
    """Return the digest of a model without a manifest, using the digests computed during the merge."""
    if source.adapter is not None:
        digest: str = source.adapter.digest()
        return digest
    checkpoint = Checkpoint.of_folder(source.folder)
    known = {name: read[entry] for name, entry in checkpoint.entries.items() if entry in read}
    return digest_of_tensors(digests_of_untouched(checkpoint, known))


def _data_statements(plan: MergePlan) -> dict[str, DataStatement]:
    return {name: manifest.data for name, manifest in manifests_of(plan).items() if name in plan.experts}


def _method_version(plan: MergePlan) -> dict[str, str]:
    provider = installed_plugins().provider(MergeMethod, plan.method.name)
    return {provider.distribution: provider.version}
