"""Reports of a merge plan, as tables and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..engine.tensor_plan import TensorPlan
from .plan import MergePlan

MEGA = 1e6
ACTIONS = {
    "merge": "merged",
    "copy": "copied",
    "require_equal": "compared and copied",
    "stack": "stacked",
    "computed": "computed",
}
"""Action of a tensor plan -> words in the report."""


def plan_content(plan: MergePlan, output: Path | None) -> dict[str, Any]:
    """Return the output of `merge --plan --json`: tensors with their sources, and the estimated cost."""
    return {
        "method": plan.method.name,
        "output": str(output) if output is not None else None,
        "models": {name: {"folder": str(source.folder), "kind": source.kind} for name, source in plan.sources.items()},
        "weights": plan.weights(),
        "layers": len(plan.stack.layers),
        "tensors": {tensor.name: _tensor_content(tensor) for tensor in plan.stack.tensors},
        "files": {shard.file: shard.num_bytes for shard in plan.shards},
        "bytes_to_read": plan.bytes_to_read,
        "bytes_to_write": plan.bytes_to_write,
        "peak_memory_bytes": plan.peak_bytes,
        "seconds": round(plan.seconds(), 1),
        "licence": plan.licence,
        "notes": list(plan.notes),
    }


def plan_rows(plan: MergePlan, output: Path | None) -> list[tuple[str, str]]:
    """Return a summary of the plan as (label, value) rows."""
    actions = Counter(tensor.action for tensor in plan.stack.tensors)
    num_settings = len({repr(tensor.options) for tensor in plan.stack.tensors if tensor.action == "merge"})
    settings = f", {num_settings} settings by layer or module" if num_settings > 1 else ""
    weights, vocabulary = plan.weights(), plan.vocabulary
    rows = [
        ("method", plan.method.name + settings),
        ("experts", ", ".join(f"{name} {weights[name]:.3g}" for name in plan.experts)),
        ("models", ", ".join(f"{name} ({source.kind})" for name, source in plan.sources.items())),
        ("layers", str(len(plan.stack.layers))),
        ("tensors", ", ".join(f"{count} {ACTIONS[action]}" for action, count in sorted(actions.items()))),
        (
            "vocabulary",
            f"{vocabulary.size:,} rows, {len(vocabulary.added)} tokens added" if vocabulary else "unchanged",
        ),
        ("reads", f"{plan.bytes_to_read / MEGA:,.1f} MB"),
        ("writes", f"{plan.bytes_to_write / MEGA:,.1f} MB in {len(plan.shards)} file(s)"),
        ("memory", f"about {plan.peak_bytes / MEGA:,.0f} MB at most"),
        ("time", f"about {plan.seconds():,.1f} s"),
        ("licence", plan.licence or "unknown"),
        *(("note", note) for note in plan.notes),
    ]
    return [*rows, ("output", str(output))] if output is not None else rows


def tensor_rows(plan: MergePlan) -> list[tuple[str, ...]]:
    """Return one row per tensor: name, shape, dtype, action, sources, weights."""
    return [
        (
            tensor.name,
            "x".join(map(str, tensor.shape)),
            tensor.dtype,
            tensor.action,
            ", ".join(tensor.expert_names if tensor.action == "merge" else tensor.expert_names[:1]),
            ", ".join(f"{weight:.3g}" for weight in tensor.weights),
        )
        for tensor in plan.stack.tensors
    ]


def _tensor_content(tensor: TensorPlan) -> dict[str, Any]:
    content: dict[str, Any] = {
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "action": tensor.action,
        "sources": {
            name: f"{stored.entry.file.name}:{stored.name}"
            for name, stored in zip(tensor.expert_names, tensor.experts, strict=True)
        },
    }
    if tensor.action == "merge":
        content["weights"] = dict(zip(tensor.expert_names, tensor.weights, strict=True))
        content["options"] = asdict(tensor.options) if tensor.options is not None else {}
    if tensor.seed is not None:
        content["seed"] = f"{tensor.seed.entry.file.name}:{tensor.seed.name}"
    return content
