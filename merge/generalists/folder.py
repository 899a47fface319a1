"""Writes the folder of a merged generalist: weights, configuration, tokenizer, card and manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...core.artefacts.digests import CARD_FILE, digest_of_file
from ...core.artefacts.files import copy_files, read_json, remove_tree, write_json, write_text
from ...core.artefacts.model_config import LAYER_KEYS, is_tied, text_config
from ...core.artefacts.numeric import DTYPES
from ...core.artefacts.safetensors_io import TensorEntry, write_tensors
from ...core.hooks.manager import installed_plugins
from ...core.hooks.merging import KeptElements, MergeMethod, TensorMerge
from ...core.manifests.finishing import finish_artefact
from ...core.manifests.generalist import ExpertChange, GeneralistConfig, SearchRecord
from ...core.manifests.manifest import Manifest, Parent, read_manifest
from ...core.reporting import SILENT, Reporter
from ..engine.calculator import run_merge
from ..engine.writing import fingerprint_of
from ..planning.assembly import ROUTER_FOLDER
from ..planning.plan import MergePlan
from ..recipes.recipe import recipe_as_json
from ..sources.tensor_names import head_name
from .card import model_card
from .chat_templates import write_chat_template
from .tokenizer_files import without_token_ids, write_tokenizer

_NOTICEABLE = 1.05


def write_generalist(
    plan: MergePlan,
    folder: Path,
    name: str,
    *,
    provenance: Manifest | None = None,
    fitted_on: Sequence[str] = (),
    search: SearchRecord | None = None,
    history: Sequence[ExpertChange] = (),
    reporter: Reporter = SILENT,
) -> Manifest:
    """Write a generalist into `folder` and return its manifest; resumes an interrupted merge of the same plan.

    `provenance` holds parents, configuration, data and licence of a generalist that is made by changing another one.
    `config.json` is written after the weights, so that an incomplete folder cannot be loaded as a model.
    """
    for note in plan.notes:
        reporter.say(note)
    written = run_merge(
        plan.tensor_method,
        plan.shards,
        folder,
        fingerprint=fingerprint_of(plan.identity()),
        vocabulary=plan.vocabulary,
        round_to=plan.recipe.input_dtype,
        settings=plan.settings,
        reporter=reporter,
    )
    if written.resumed:
        reporter.say(f"resuming: {written.resumed} of {len(written.digests)} tensors are already complete")
    for note in _notes_on_kept(written.kept, plan.tensor_method):
        reporter.say(note)
    write_tokenizer(plan.vocabulary, plan.leading.model_folder, folder)
    if plan.recipe.chat_template is not None:
        write_chat_template(
            plan.recipe.chat_template, [source.model_folder for source in plan.sources.values()], folder
        )
    _write_generation_config(plan, folder)
    _write_router_statistics(plan, folder)
    _write_config(plan, folder)
    manifest = provenance or Manifest(
        kind="generalist",
        name=name,
        parents=_parents(plan, written.read),
        config=GeneralistConfig(
            method=plan.method.name,
            kind=plan.method.kind,
            weights=plan.weights(),
            options=_options(plan),
            experts=plan.assembly.experts if plan.assembly is not None else (),
            fitted_on=tuple(fitted_on),
            recipe=recipe_as_json(plan.recipe),
            shard_bytes=plan.shard_bytes,
            mixture=plan.assembly.record if plan.assembly is not None else None,
            search=search,
            history=tuple(history),
        ),
        expert_data={
            name: source.manifest.data
            for name, source in plan.sources.items()
            if source.manifest is not None and name in plan.experts
        },
        licence=plan.licence,
    )
    versions = method_version(plan.method)
    return finish_artefact(
        folder, replace(manifest, name=name, versions=versions), card=model_card, known=written.digests
    )


def method_version(method: MergeMethod) -> dict[str, str]:
    """Return the version of the distribution that provides a merge method."""
    provider = installed_plugins().provider(MergeMethod, method.name)
    return {provider.distribution: provider.version}


def note_evaluation(folder: Path, scores: Mapping[str, Any], verdict: str, holds: bool) -> None:
    """Add an evaluation (`expertctl eval --json`) and its verdict against baselines to a manifest and its card."""
    manifest = read_manifest(folder)
    metrics = {**manifest.metrics, "evaluation": dict(scores), "gate": {"holds": holds, "verdict": verdict}}
    manifest = replace(manifest, metrics=metrics)
    write_text(folder / CARD_FILE, model_card(manifest, scores))
    files = {**manifest.files, CARD_FILE: digest_of_file(folder / CARD_FILE)}
    replace(manifest, files=files).write(folder)


def _notes_on_kept(experts: Mapping[str, KeptElements], method: TensorMerge) -> Iterator[str]:
    """Yield a note for every expert of which noticeably more elements are kept than its options say."""
    hint = "; option at_threshold=first keeps the wanted number" if hasattr(method.options, "at_threshold") else ""
    for name, elements in experts.items():
        if elements.kept > elements.wanted * _NOTICEABLE:
            yield (
                f"{elements.kept / elements.size:.1%} of the changes of '{name}' are kept, and not "
                f"{elements.wanted / elements.size:.1%}: many are equal in size, down to the smallest that is kept{hint}"
            )


def _options(plan: MergePlan) -> dict[str, Any]:
    """Return the options in user syntax: lists for tuples, names without a trailing underscore."""
    if plan.assembly is not None:
        return dict(plan.assembly.record.options)
    options = next((tensor.options for tensor in plan.stack.tensors if tensor.action == "merge"), None)
    return {
        key.rstrip("_"): list(value) if isinstance(value, tuple) else value
        for key, value in (asdict(options) if options is not None else {}).items()
    }


def _write_router_statistics(plan: MergePlan, folder: Path) -> None:
    """Write the statistics of a mixture's router, a file per expert, in place of those of an interrupted merge."""
    target = folder / ROUTER_FOLDER
    remove_tree(target)
    if plan.assembly is None or not plan.assembly.router_statistics:
        return
    import numpy as np
    import torch

    target.mkdir()
    for expert, arrays in plan.assembly.router_statistics.items():
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        write_tensors(target / f"{expert}.safetensors", tensors)


def _write_generation_config(plan: MergePlan, folder: Path) -> None:
    """Copy `generation_config.json`, without the ids of removed tokens."""
    name = "generation_config.json"
    copy_files(plan.leading.model_folder, folder, [name])
    if (folder / name).is_file():
        settings = read_json(folder / name)
        changed = without_token_ids(settings, _removed_ids(plan))
        if changed != settings:
            write_json(folder / name, changed)


def _removed_ids(plan: MergePlan) -> frozenset[int]:
    return frozenset(plan.vocabulary.removed.values()) if plan.vocabulary is not None else frozenset()


def _write_config(plan: MergePlan, folder: Path) -> None:
    """Write `config.json`: the leading model's with the changes of the merge; a byte-identical copy if unchanged."""
    source = plan.leading
    config = dict(plan.assembly.config) if plan.assembly is not None else source.config
    changed = _with_changes(config, _config_changes(plan, text_config(config)))
    changed.pop("quantization_config", None)  # the weights are dequantized
    if plan.assembly is None and changed == config:
        copy_files(source.model_folder, folder, ["config.json"])
    else:
        write_json(folder / "config.json", changed)


def _config_changes(plan: MergePlan, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the decoder that the merge changes; `config` holds those of the leading model."""
    changes: dict[str, Any] = {}
    if plan.has_other_layers:
        old, new = plan.leading.num_layers, len(plan.stack.layers)
        changes = {key: new for key in LAYER_KEYS if key in config}
        configs = {model: text_config(plan.sources[model].config) for model, _ in plan.stack.layers}
        for key, value in config.items():
            if isinstance(value, list) and len(value) == old and key not in changes:  # one entry per layer
                changes[key] = [configs[model][key][layer] for model, layer in plan.stack.layers]
    if plan.vocabulary is not None and plan.vocabulary.size != config.get("vocab_size"):
        changes["vocab_size"] = plan.vocabulary.size
    changes |= {
        key: value for key, value in without_token_ids(config, _removed_ids(plan)).items() if value != config[key]
    }
    dtype = plan.recipe.dtype or plan.recipe.input_dtype
    if dtype is not None:
        changes["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPES[dtype].torch
    untied = any(head_name({tensor.name.removeprefix("network."): tensor}) for tensor in plan.stack.tensors)
    if untied and is_tied(config):
        changes["tie_word_embeddings"] = False
    return changes


def _with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with changed settings of its decoder, also in the configurations nested in it."""
    nested = {key: config[key] for key in ("member", "text_config") if isinstance(config.get(key), Mapping)}
    changed = {
        key: _with_changes(part, {name: changes[name] for name in changes if key == "member" or name in part})
        for key, part in nested.items()
    }
    own = {
        name: value
        for name, value in changes.items()
        if name in config or not ("member" in nested or any(name in part for part in nested.values()))
    }
    return {**config, **own, **changed}


def _parents(plan: MergePlan, read: Mapping[TensorEntry, str]) -> tuple[Parent, ...]:
    weights = plan.weights()
    return tuple(
        Parent.of(source.manifest, name, weights.get(name))
        if source.manifest is not None
        else Parent(source.kind, name, source.digest(read), weights.get(name), licence=source.licence)
        for name, source in plan.sources.items()
    )
