"""`expertctl show`: show one artefact or the workspace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...core.errors import UserError
from ..context import Session, pass_session
from ..group import cli_command
from ..options import name_list, option
from ..output import Table, number, shares, short
from ..summaries import memory_content, memory_origin, origin, show_memory

if TYPE_CHECKING:
    from expertctl.workspace import Workspace

    from ...core.manifests.manifest import Manifest, Parent
    from ...experts.runs.jobs.status import JobStatus


@cli_command("show", example="expertctl show forest")
@click.argument("name", metavar="[NAME]", required=False)
@option("--routing", "MODEL", "Show how the routers of a mixture distribute text over its experts.")
@name_list("--domains", "Domains for --routing. Default: all domains.")
@pass_session
def command(session: Session, name: str | None, routing: str | None, domains: tuple[str, ...] | None) -> None:
    """Show one artefact, or the contents of the workspace.

    NAME is an artefact of this workspace or a folder, or a run that a job of a cluster trains.
    """
    if domains is not None and routing is None:
        raise click.UsageError("--domains needs --routing")
    if routing is not None:
        if name is not None:
            raise click.UsageError("give NAME or --routing MODEL, not both")
        _show_routing(session, routing, domains)
    elif name is not None:
        status = _job(session, name)
        if status is not None:
            _show_job(session, name, status)
        elif (memory := _memory(session, name)) is not None:
            show_memory(session, memory)
        else:
            _show_artefact(session, session.artefact(name))
    else:
        _show_workspace(session, session.open())


def _job(session: Session, name: str) -> JobStatus | None:
    try:
        return session.open().job(name)
    except UserError:  # outside of a workspace
        return None


def _memory(session: Session, name: str) -> Path | None:
    try:
        return session.memory(name)
    except UserError:
        return None


def _show_job(session: Session, name: str, status: JobStatus) -> None:
    job, state = status.job, status.state
    content = {
        "name": name,
        "launcher": job.launcher.name,
        "job": job.id,
        "state": state.state if state is not None else None,
        "node": state.node if state is not None else None,
        "reason": state.reason if state is not None else status.problem,
        "submitted_at": job.submitted_at,
        "attempt": job.attempt,
        "log": str(status.log),
    }
    labels = {"submitted_at": "submitted", "log": "output"}
    rows = [(labels.get(key, key), str(value)) for key, value in content.items() if value is not None]
    session.finish(content, Table(("", ""), rows, headings=False))


def _show_artefact(session: Session, folder: Path) -> None:
    from ...core.manifests.manifest import read_manifest
    from ...core.manifests.records import record_as_json

    manifest = read_manifest(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    facts = Table(("", ""), [*_facts(folder, manifest), ("weights on disk", f"{number(size)} bytes")], headings=False)
    session.finish({"folder": str(folder), **record_as_json(manifest)}, facts)


def _show_routing(session: Session, model: str, domains: tuple[str, ...] | None) -> None:
    report = session.open().generalists.routing(model, domains)
    columns = ("domain", "tokens", *report.experts, "entropy")
    rows = [
        (
            domain,
            number(domain_report.tokens),
            *(f"{share:.3f}" for share in domain_report.mean_load()),
            f"{sum(domain_report.entropy) / len(domain_report.entropy):.3f}",
        )
        for domain, domain_report in report.domains.items()
    ]
    title = "share of routed tokens per expert, mean over layers; entropy of the router in nats"
    dead = report.dead()
    session.finish(
        report.as_json(),
        Table(columns, rows, title=title, right=frozenset(range(1, len(columns)))),
        *([f"dead: {', '.join(f'{expert} in layer {layer}' for layer, expert in dead)}"] if dead else []),
    )


def _facts(folder: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """Return (label, value) pairs that describe an artefact, without empty values."""
    parents = [
        f"{_title(parent)} {short(parent.digest)}"
        + (f" (weight {parent.weight:.3f})" if parent.weight is not None else "")
        for parent in manifest.parents
    ]
    facts = [
        ("name", manifest.name),
        ("kind", manifest.kind),
        ("folder", str(folder)),
        ("digest", manifest.digest),
        ("made", origin(manifest)),
        *(("parent", parent) for parent in parents),
        *_mixture_facts(manifest),
        *_training_facts(manifest),
        *(
            (f"option {key}", str(value))
            for key, value in (manifest.merged.options if manifest.merged is not None else {}).items()
        ),
        ("tensors", f"{len(manifest.tensors)}"),
        ("tokenizer", short(manifest.tokenizer)),
        ("owner", manifest.owner),
        ("licence", manifest.licence),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]
    return [(key, value) for key, value in facts if value]


def _title(parent: Parent) -> str:
    return parent.name if parent.name == parent.kind else f"{parent.kind} {parent.name}"


def _mixture_facts(manifest: Manifest) -> list[tuple[str, str]]:
    facts = []
    merged = manifest.merged
    if merged is not None and merged.mixture is not None:
        mixture = merged.mixture
        facts.append(("mixture", f"{mixture.target}, top {mixture.top_k} of {', '.join(merged.experts)}"))
    facts += [
        ("tuned", f"{tuning.trains} on {', '.join(tuning.domains)}, {number(tuning.tokens)} tokens")
        for tuning in manifest.tunings
        if not tuning.left
    ]
    facts += [(event.change, f"{event.expert} on {event.date}") for event in manifest.history]
    return facts


def _training_facts(manifest: Manifest) -> list[tuple[str, str]]:
    data, metrics = manifest.data, manifest.metrics
    facts = []
    of_part = [("domain", data.domains), ("annealing", data.annealing)]
    for part, name, statement in ((part, *item) for part, domains in of_part for item in domains.items()):
        counts = f"{number(statement.documents)} documents, {number(statement.tokens)} tokens"
        digest = f", digest {short(statement.digest)}" if statement.digest is not None else ", rounded"
        facts.append((f"{part} {name}", counts + digest))
    if data.trained_tokens is not None:
        facts.append(("trained tokens", number(data.trained_tokens)))
    if data.privacy is not None:
        from ...experts.training.privacy.accounting import describe_privacy

        facts.append(("privacy", describe_privacy(data.privacy)))
    if metrics.get("validation_loss"):
        facts.append(("validation loss", shares(metrics["validation_loss"], digits=3) + " nats per token"))
    return facts


def _show_workspace(session: Session, workspace: Workspace) -> None:
    from ...core.manifests.manifest import read_manifest

    finished = {folder: read_manifest(folder) for folder in workspace.layout.finished()}
    memories = workspace.memories.list()
    unfinished = workspace.unfinished()
    content: dict[str, Any] = {
        "workspace": str(workspace.root),
        "domains": list(workspace.config.domains),
        "artefacts": [
            {
                "name": manifest.name,
                "kind": manifest.kind,
                "folder": str(folder),
                "digest": manifest.digest,
                "made": origin(manifest),
            }
            for folder, manifest in finished.items()
        ],
        "memories": [memory_content(memory) for memory in memories],
        "unfinished": unfinished,
        "not_started": _not_started(workspace),
    }
    rows: list[tuple[str, str, str, str]] = [
        (manifest.name, manifest.kind, short(manifest.digest), origin(manifest)) for manifest in finished.values()
    ]
    rows += [(memory.name, "memory", short(memory.digest), memory_origin(memory)) for memory in memories]
    rows += [(name, "unfinished", "", f"resume with: {resume_command}") for name, resume_command in unfinished.items()]
    rows += [
        (name, "not started", "", f"in expertctl.yaml; start with: {start_command}")
        for name, start_command in content["not_started"].items()
    ]
    domains = ", ".join(workspace.config.domains) or "none yet"
    table = Table(("name", "kind", "digest", "made"), rows)
    session.finish(content, f"workspace {workspace.root}", f"domains   {domains}", "", table)


def _not_started(workspace: Workspace) -> dict[str, str]:
    """Return the artefacts of `expertctl.yaml` that were not started, with the command that starts each."""
    start_commands = {"seed": "expertctl seed"} if not workspace.layout.seed.exists() else {}
    for name in workspace.config.experts:
        if not (workspace.experts / name).exists():
            start_commands[name] = f"expertctl train {name}"
    for name in workspace.config.merges:
        if not (workspace.generalists / name).exists():
            start_commands[name] = f"expertctl merge {name}"
    return start_commands
