"""The model card of an artefact: its README.md, with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ...core.manifests.generalist import GeneralistConfig
from ...core.manifests.manifest import Manifest
from ...core.manifests.statements import DataStatement

_BITS_PER_BYTE = "bits_per_byte"
_SHORT = 12
_LOADING_WITH_EXPERTCTL = """```python
import expertctl

model, tokenizer = expertctl.load_model("FOLDER")
```"""
_PARTICIPATION = {"shares": "counted", "late": "of these late", "refused": "refused", "missing": "not delivered"}
"""Fields of a round's record with owners -> what they are called."""
_LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```"""


def model_card(manifest: Manifest, evaluation: Mapping[str, Any] | None = None, *, exported: bool = False) -> str:
    """Return the model card: description, parents, recipe, data, evaluation and lineage.

    `evaluation` is the output of `expertctl eval --json`; `exported`: for a whole model without the manifest. The card
    contains no times and no paths: the same manifest gives the same card.
    """
    merged = manifest.merged
    contains_models = merged is not None and merged.kind in ("ensemble", "stitched")
    needs_expertctl = not exported and (manifest.kind == "expert" or contains_models)
    parts = [
        _front_matter(manifest),
        f"# {manifest.name}",
        _introduction(manifest, exported),
        _parents_section(manifest),
        _recipe_section(manifest.name, merged) if merged is not None else "",
        _participation_section(merged) if merged is not None and merged.rounds else "",
        _data_section(manifest),
        _evaluation_section(evaluation, manifest.metrics.get("gate")),
        "## How to load it",
        _LOADING_WITH_EXPERTCTL if needs_expertctl else _LOADING,
        "## Lineage",
        _lineage(manifest, exported),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(manifest: Manifest) -> str:
    """Return the metadata block that the Hugging Face hub reads."""
    from huggingface_hub import ModelCardData

    licences = manifest.licence.split("; ") if manifest.licence else []
    relation = {"generalist": "merge", "expert": "finetune"}.get(manifest.kind)
    tags = ["expertctl", manifest.kind]
    if manifest.merged is not None:
        tags += ["merge", manifest.merged.method]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=licences[0].lower() if len(licences) == 1 else "other" if licences else None,
        license_name=" and ".join(licences) if len(licences) > 1 else None,
        base_model=[parent.name for parent in manifest.parents] or None,
        base_model_relation=("finetune" if manifest.is_shared else relation) if manifest.parents else None,
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---"


def _introduction(manifest: Manifest, exported: bool) -> str:
    merged = manifest.merged
    if merged is not None and merged.kind == "shared":
        return (
            f"A language model that {_join_names(list(manifest.expert_data))} trained together with "
            f"[expertctl](https://pypi.org/project/expertctl), each next to its own text: {len(merged.rounds)} rounds of "
            f"`{merged.method}`. No owner's contribution can be removed from it."
        )
    if merged is not None:
        names = [parent.name for parent in manifest.parents if parent.weight is not None]
        return (
            f"A language model merged with [expertctl](https://pypi.org/project/expertctl) by the method "
            f"`{merged.method}` from {_join_names(names)}. {_changes_since_merge(merged)}"
        )
    if manifest.kind == "expert":
        domains = ", ".join(manifest.domains) or "an unnamed domain"
        if exported:
            return (
                f"A language model for {domains}: its seed with the tensors (`{manifest.trainable}`) that training changed. "
                "It was trained apart from all other experts."
            )
        return (
            f"An expert for {domains}: the tensors (`{manifest.trainable}`) in which it differs from its seed. It was "
            "trained apart from all other experts."
        )
    return "The seed that experts are branched from."


def _changes_since_merge(merged: GeneralistConfig) -> str:
    trained = [
        f"Its {tuning.trains} was then trained on {', '.join(tuning.domains)} ({tuning.tokens:,} tokens)."
        for tuning in merged.tunings
        if not tuning.left
    ]
    changes = [f"`{event.expert}` {event.change} on {event.date}." for event in merged.history]
    return " ".join([*(trained or ["No training happened in the merge."]), *changes])


def _join_names(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}" if quoted else "its parents"


def _parents_section(manifest: Manifest) -> str:
    if not manifest.parents:
        return ""
    rows = [
        (
            parent.name,
            parent.kind,
            f"{parent.weight:.4g}" if parent.weight is not None else "",
            parent.owner or "not known",
            parent.licence or "not known",
            _describe_data(manifest.expert_data.get(parent.name, DataStatement())),
            f"`{parent.digest[:_SHORT]}`",
        )
        for parent in manifest.parents
    ]
    head = ("model", "kind", "weight", "owner", "licence", "trained on", "digest")
    unknown = _join_names([parent.name for parent in manifest.parents if not parent.licence])
    remark = f"\n\nThe licence is not known, as none is recorded for {unknown}." if not manifest.licence else ""
    return f"## Made from\n\n{_table(head, rows)}{remark}"


def _participation_section(merged: GeneralistConfig) -> str:
    """Return a table of the rounds in which each owner counted, was late, was refused or did not deliver."""
    rounds = merged.rounds
    owners = sorted(
        {owner for round_ in rounds for owner in (*round_["shares"], *round_["refused"], *round_["missing"])}
    )
    rows = [
        (
            owner,
            *(str(sum(owner in round_.get(kind, ()) for round_ in rounds)) for kind in _PARTICIPATION),
            f"{sum(round_['shares'].get(owner, 0.0) for round_ in rounds) / len(rounds):.3f}",
        )
        for owner in owners
    ]
    head = ("owner", *_PARTICIPATION.values(), "mean share")
    return f"## Participation\n\nOf {len(rounds)} rounds:\n\n{_table(head, rows)}"


def _describe_data(data: DataStatement) -> str:
    """Return the domains of a data statement in one line, with the privacy guarantee of their text."""
    domains = ", ".join(f"{name} ({domain.tokens:,} tokens)" for name, domain in data.domains.items())
    if data.annealing:
        domains += f"; annealed on {', '.join(data.annealing)}"
    privacy = data.privacy
    if privacy is None or privacy.epsilon is None:
        return domains
    return (
        f"{domains}; differential privacy: epsilon {privacy.epsilon:.2f} at delta {privacy.delta:g} for "
        f"{privacy.protects}"
    )


def _recipe_section(name: str, merged: GeneralistConfig) -> str:
    run, section = merged.run, "merges"
    settings: dict[str, Any]
    if merged.tunings:
        if run is None or run.name != name:
            return ""  # experts changed after the training: there is no single recipe
        section = "tuned"
        settings = {"from": run.base, "trains": run.trains, "domains": list(run.domains)}
        if run.options:
            settings["options"] = dict(run.options)
        settings["tokens"] = merged.tunings[-1].tokens
    else:
        settings = {"method": merged.method}
        if merged.weights:
            settings["weights"] = {expert: float(f"{weight:.6g}") for expert, weight in merged.weights.items()}
        if merged.options:
            settings["options"] = dict(merged.options)
        if merged.kind == "shared":
            section = "shared"
            settings["training"] = dict(merged.training or {})
    text = yaml.safe_dump({section: {name: settings}}, sort_keys=False, allow_unicode=True)
    return f"## Recipe\n\n```yaml\n{text}```"


def _data_section(manifest: Manifest) -> str:
    if manifest.is_shared:
        rows = [(owner, _describe_data(data)) for owner, data in manifest.expert_data.items()]
        return f"## Trained on\n\n{_table(('owner', 'text'), rows)}"
    return f"## Trained on\n\n{_describe_data(manifest.data)}" if manifest.domains else ""


def _evaluation_section(evaluation: Mapping[str, Any] | None, gate: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "## Evaluation\n\nNone was recorded here."
    domains = list(evaluation["domains"])
    metric = _first_metric(evaluation)
    rows = [
        (name, *(f"{scores[metric][domain]:.3f}" for domain in domains))
        for name, scores in evaluation["models"].items()
    ]
    title = "Bits per byte on held-out text; lower is better." if metric == _BITS_PER_BYTE else f"`{metric}`."
    verdict = f"\n\n**{gate['verdict']!s}.**" if gate is not None else ""
    return f"## Evaluation\n\n{title}\n\n{_table(('model', *domains), rows)}{verdict}"


def _first_metric(evaluation: Mapping[str, Any]) -> str:
    """Return the first metric of an evaluation; evaluators of plugins have their own."""
    models = list(evaluation["models"].values())
    metrics = (key for key in (models[0] if models else {}) if key not in ("tokens", "text"))
    return next(metrics, _BITS_PER_BYTE)


def _lineage(manifest: Manifest, exported: bool) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    if exported:
        return (
            f"Exported from the {manifest.kind} `{manifest.name}` with the digest `{manifest.digest}`. "
            f"Tokenizer `{manifest.tokenizer[:_SHORT]}`. Made with {versions or 'tools that were not recorded'}."
        )
    return (
        f"Digests of every tensor and file are in the manifest beside this card; `expertctl verify` checks them. "
        f"Tokenizer `{manifest.tokenizer[:_SHORT]}`. Made with {versions or 'tools that were not recorded'}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
