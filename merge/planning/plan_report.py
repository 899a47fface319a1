"""A merge's plan as people and programs read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..engine.tensor_plan import TensorPlan
from .plan import MergePlan

MEGA = 1e6


def plan_content(plan: MergePlan, output: Path | None) -> dict[str, Any]:
    """Return what `merge --plan --json` prints: every tensor with its sources, and what the merge costs."""
    return {
        "method": plan.method.name,
        "output": str(output) if output is not None else None,
        "models": {
            name: {"folder": str(source.folder), "kind": source.kind} for name, source in plan.sources.items()
        },
        "weights": plan.weights(),
        "layers": len(plan.stack.layers),
        "tensors": {one.name: _tensor_content(one) for one in plan.stack.tensors},
        "files": {shard.file: shard.num_bytes for shard in plan.shards},
        "bytes_to_read": plan.bytes_to_read,
        "bytes_to_write": plan.bytes_to_write,
        "peak_memory_bytes": plan.peak_bytes,
        "seconds": round(plan.seconds(), 1),
        "licence": plan.licence,
        "notes": list(plan.notes),
    }


def plan_rows(plan: MergePlan, output: Path | None) -> list[tuple[str, str]]:
    """Return the plan in a few lines: (what, figures)."""
    actions = Counter(one.action for one in plan.stack.tensors)
    shared = {repr(one.options) for one in plan.stack.tensors if one.action == "merge"}
    words = {"merge": "merged", "copy": "copied", "agree": "compared and copied"}
    words |= {"stack": "put end to end", "given": "made here"}
    weights = plan.weights()
    vocabulary = plan.vocabulary
    rows = [
        (
            "method",
            plan.method.name + ("" if len(shared) <= 1 else f", {len(shared)} settings by layer or module"),
        ),
        ("experts", ", ".join(f"{name} {weights[name]:.3g}" for name in plan.experts)),
        ("models", ", ".join(f"{name} ({source.kind})" for name, source in plan.sources.items())),
        ("layers", str(len(plan.stack.layers))),
        ("tensors", ", ".join(f"{count} {words[action]}" for action, count in sorted(actions.items()))),
        (
            "vocabulary",
            f"{vocabulary.size:,} rows, {len(vocabulary.added)} tokens added" if vocabulary else "the same",
        ),
        ("reads", f"{plan.bytes_to_read / MEGA:,.1f} MB"),
        ("writes", f"{plan.bytes_to_write / MEGA:,.1f} MB in {len(plan.shards)} file(s)"),
        ("memory", f"about {plan.peak_bytes / MEGA:,.0f} MB at most"),
        ("time", f"about {plan.seconds():,.1f} s"),
        ("licence", plan.licence or "not known"),
    ]
    rows += [("note", note) for note in plan.notes]
    return rows + ([("output", str(output))] if output is not None else [])


def tensor_rows(plan: MergePlan) -> list[tuple[str, ...]]:
    """Return one row for each tensor: name, shape, dtype, how it is made, from what, with which weights."""
    return [
        (
            one.name,
            "x".join(map(str, one.shape)),
            one.dtype,
            one.action,
            ", ".join(one.expert_names if one.action == "merge" else one.expert_names[:1]),
            ", ".join(f"{weight:.3g}" for weight in one.weights),
        )
        for one in plan.stack.tensors
    ]


def _tensor_content(one: TensorPlan) -> dict[str, Any]:
    content: dict[str, Any] = {
        "dtype": one.dtype,
        "shape": list(one.shape),
        "action": one.action,
        "sources": {
            name: f"{stored.entry.file.name}:{stored.name}"
            for name, stored in zip(one.expert_names, one.experts, strict=True)
        },
    }
    if one.action == "merge":
        content["weights"] = dict(zip(one.expert_names, one.weights, strict=True))
        content["options"] = asdict(one.options) if one.options is not None else {}
    if one.seed is not None:
        content["seed"] = f"{one.seed.entry.file.name}:{one.seed.name}"
    return content
