"""The model card of an artefact: its README.md, with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ...core.artefacts.lineage import Manifest
from ..sources.history import history_of

CARD_FILE = "README.md"
_SHORT = 12
_LOADING = {
    True: """```python
import expertctl

model, tokenizer = expertctl.load_model("FOLDER")
```""",
    False: """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```""",
}


def model_card(
    manifest: Manifest,
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a model card: what it is, what it was made from and how, and what is known of it.

    `evaluation` is what `expertctl eval --json` prints. The same manifest gives the same card: no time and no path is
    in it.
    """
    parts = [
        _front_matter(manifest),
        f"# {manifest.name}",
        _introduction(manifest),
        _parents_section(manifest),
        _recipe_section(manifest),
        _data_section(manifest),
        _evaluation_section(evaluation, manifest.metrics.get("gate")),
        "## How to load it",
        _LOADING[
            manifest.config.get("kind") not in (None, "average", "moe", "shared") or manifest.kind == "expert"
        ],
        "## Lineage",
        _lineage(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(manifest: Manifest) -> str:
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    licences = (manifest.licence or "").split("; ")
    if manifest.licence and len(licences) == 1:
        content["license"] = manifest.licence.lower()
    elif manifest.licence:
        content |= {"license": "other", "license_name": " and ".join(licences)}
    if manifest.parents:
        content["base_model"] = [parent.name for parent in manifest.parents]
        relation = {"generalist": "merge", "expert": "finetune"}.get(manifest.kind)
        if manifest.config.get("kind") == "shared":
            relation = "finetune"
        if relation:
            content["base_model_relation"] = relation
    method = manifest.config.get("method")
    tags = ["expertctl", manifest.kind, *(["merge", method] if manifest.kind == "generalist" else [])]
    content["tags"] = [tag for tag in tags if tag]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _introduction(manifest: Manifest) -> str:
    if manifest.config.get("kind") == "shared":
        return _trained_together(manifest)
    if manifest.kind == "generalist":
        names = [parent.name for parent in manifest.parents if parent.weight is not None]
        return (
            f"A language model merged with [expertctl](https://pypi.org/project/expertctl) by the method "
            f"`{manifest.config.get('method')}` from {_listed(names)}. {_trained_since(manifest)}"
        )
    if manifest.kind == "expert":
        domains = ", ".join(manifest.data.get("domains", {})) or "a domain that is not named"
        return (
            f"An expert of {domains}: the tensors (`{manifest.trainable}`) in which it differs from its seed after "
            "training apart from all others."
        )
    return "The seed that experts are branched from."


def _trained_together(manifest: Manifest) -> str:
    """Return in a sentence or two who trained a shared model, and how."""
    rounds = manifest.config.get("rounds", ())
    return (
        f"A language model that {_listed(list(manifest.data))} trained together with "
        f"[expertctl](https://pypi.org/project/expertctl), each next to its own text: {len(rounds)} rounds of "
        f"`{manifest.config.get('method')}`. Nobody can be taken out of it."
    )


def _trained_since(manifest: Manifest) -> str:
    """Return in a sentence or more what was trained of a generalist after its experts met, and who has left it."""
    mixture = manifest.config.get("mixture") or {}
    tuned = [
        f"Its {one['trains']} was then trained on {', '.join(one['domains'])} ({one['tokens']:,} tokens)."
        for one in mixture.get("tuned", ())
        if not one.get("left")
    ]
    changes = [f"`{one['expert']}` {one['what']} on {one['when']}." for one in history_of(manifest)]
    return " ".join([*(tuned or ["No training happened in the merge."]), *changes])


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return (
        quoted[0]
        if len(quoted) == 1
        else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
        if quoted
        else "its parents"
    )


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
            _tokens(manifest.data.get(parent.name) or {}),
            f"`{parent.digest[:_SHORT]}`",
        )
        for parent in manifest.parents
    ]
    head = ("model", "kind", "weight", "owner", "licence", "trained on", "digest")
    return f"## Made from\n\n{_table(head, rows)}"


def _tokens(data: Mapping[str, Any]) -> str:
    """Return the domains of a data statement in a line, and what protects their text."""
    domains = data.get("domains", {})
    named = ", ".join(
        f"{name} ({about.get('tokens', 0):,} tokens)" if isinstance(about, Mapping) else name
        for name, about in domains.items()
    )
    private = data.get("privacy") or {}
    if private.get("epsilon") is None:
        return named
    return (
        f"{named}; differential privacy: epsilon {private['epsilon']:.2f} at delta {private['delta']:g} for "
        f"{private['protects']}"
    )


def _recipe_section(manifest: Manifest) -> str:
    if manifest.kind != "generalist":
        return ""
    run = manifest.config.get("run")
    tunings = (manifest.config.get("mixture") or {}).get("tuned")
    if tunings:
        if run is None or run["name"] != manifest.name:
            return ""  # it was changed since: no recipe makes it in one go
        tuned = {
            "from": run.get("base"),
            "trains": run.get("trains"),
            "domains": list(run.get("domains", ())),
        }
        tuned |= {"options": dict(run["options"])} if run.get("options") else {}
        return _recipe("tuned", manifest.name, tuned | {"tokens": tunings[-1]["tokens"]})
    settings: dict[str, Any] = {"method": manifest.config.get("method")}
    weights = manifest.config.get("weights")
    if weights:
        settings["weights"] = {name: float(f"{weight:.6g}") for name, weight in weights.items()}
    options = manifest.config.get("options")
    if options:
        settings["options"] = dict(options)
    kind = "merges"
    if manifest.config.get("kind") == "shared":
        kind, settings = "shared", {**settings, "training": dict(manifest.config.get("training", {}))}
    return _recipe(kind, manifest.name, settings)


def _recipe(kind: str, name: str, settings: Mapping[str, Any]) -> str:
    text = yaml.safe_dump({kind: {name: dict(settings)}}, sort_keys=False, allow_unicode=True)
    return f"## Recipe\n\n```yaml\n{text}```"


def _data_section(manifest: Manifest) -> str:
    if manifest.config.get("kind") == "shared":
        rows = [(owner, _tokens(data)) for owner, data in manifest.data.items()]
        return f"## Trained on\n\n{_table(('owner', 'text'), rows)}"
    if manifest.kind == "generalist" or not manifest.data.get("domains"):
        return ""
    return f"## Trained on\n\n{_tokens(manifest.data)}"


def _evaluation_section(evaluation: Mapping[str, Any] | None, gate: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "## Evaluation\n\nNone was recorded here."
    domains = list(evaluation["domains"])
    rows = [
        (name, *(f"{scores['bits_per_byte'][domain]:.3f}" for domain in domains))
        for name, scores in evaluation["models"].items()
    ]
    verdict = f"\n\n**{gate['verdict']!s}.**" if gate is not None else ""
    return f"## Evaluation\n\nBits per byte on validation text; lower is better.\n\n{_table(('model', *domains), rows)}{verdict}"


def _lineage(manifest: Manifest) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    return (
        f"Digests of every tensor and file are in the manifest beside this card; `expertctl verify` checks them. "
        f"Tokenizer `{manifest.tokenizer[:_SHORT]}`. Made with {versions or 'tools that were not recorded'}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
