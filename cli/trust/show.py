"""`expertctl show`: one artefact, or what is in the workspace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..output import Table, number, shares, short
from ..parsing import names
from ..summaries import origin

if TYPE_CHECKING:
    from expertctl.workspace import Workspace

    from ...core.artefacts.lineage import Manifest, Parent


@cli_command("show", example="expertctl show forest")
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--routing", metavar="MODEL", help="Show how a mixture's routers spread text over its experts.")
@click.option("--domains", type=names, metavar="A,B", help="Text for --routing. Default: all domains.")
@pass_session
def command(session: Session, name: str | None, routing: str | None, domains: tuple[str, ...] | None) -> None:
    """Show one artefact, or all that is in the workspace.

    NAME is one of this workspace, or a folder.
    """
    if domains is not None and routing is None:
        raise click.UsageError("--domains goes with --routing")
    if routing is not None:
        if name is not None:
            raise click.UsageError("give NAME or --routing MODEL, not both")
        _show_routing(session, routing, domains)
    elif name is not None:
        _show_artefact(session, session.artefact(name))
    else:
        _show_workspace(session, session.open())


def _show_artefact(session: Session, folder: Path) -> None:
    from dataclasses import asdict

    from ...core.artefacts.lineage import read_manifest

    manifest = read_manifest(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    facts = Table(
        ("", ""), [*_facts(folder, manifest), ("weights on disk", f"{number(size)} bytes")], headings=False
    )
    session.finish({"folder": str(folder), **asdict(manifest)}, facts)


def _show_routing(session: Session, model: str, domains: tuple[str, ...] | None) -> None:
    report = session.open().routing(model, domains)
    columns = ("domain", "tokens", *report.experts, "entropy")
    rows = [
        (
            domain,
            number(one.tokens),
            *(f"{share:.3f}" for share in one.mean_load()),
            f"{sum(one.entropy) / len(one.entropy):.3f}",
        )
        for domain, one in report.domains.items()
    ]
    title = "share of the tokens' choices, mean over layers; entropy of the router in nats"
    dead = report.dead()
    session.finish(
        report.as_json(),
        Table(columns, rows, title=title, right=frozenset(range(1, len(columns)))),
        *([f"dead: {', '.join(f'{expert} in layer {layer}' for layer, expert in dead)}"] if dead else []),
    )


def _facts(folder: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """Return what is worth knowing of an artefact, leaving out what it does not have."""
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
        *((f"option {key}", str(value)) for key, value in manifest.config.get("options", {}).items()),
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
    from ...merge.sources.history import history_of

    record = manifest.config.get("mixture") or {}
    facts = []
    if "target" in record:
        facts.append(
            ("mixture", f"{record['target']}, top {record['top_k']} of {', '.join(record['experts'])}")
        )
    facts += [
        ("tuned", f"{one['trains']} on {', '.join(one['domains'])}, {number(one['tokens'])} tokens")
        for one in record.get("tuned", ())
        if not one.get("left")
    ]
    facts += [(one["what"], f"{one['expert']} on {one['when']}") for one in history_of(manifest)]
    return facts


def _training_facts(manifest: Manifest) -> list[tuple[str, str]]:
    data, metrics = manifest.data, manifest.metrics
    facts = []
    for name, statement in data.get("domains", {}).items():
        counts = f"{number(statement['documents'])} documents, {number(statement['tokens'])} tokens"
        which = f", digest {short(statement['digest'])}" if statement.get("digest") else ", rounded"
        facts.append((f"domain {name}", counts + which))
    if "trained_tokens" in data:
        facts.append(("trained tokens", number(data["trained_tokens"])))
    if "privacy" in data:
        from ...experts.training.privacy.accounting import say

        facts.append(("privacy", say(data["privacy"])))
    if metrics.get("validation_loss"):
        facts.append(("validation loss", shares(metrics["validation_loss"], digits=3) + " nats per token"))
    return facts


def _show_workspace(session: Session, workspace: Workspace) -> None:
    from ...core.artefacts.lineage import read_manifest

    finished = {folder: read_manifest(folder) for folder in workspace.layout.finished()}
    unfinished = workspace.unfinished()
    content: dict[str, Any] = {
        "workspace": str(workspace.root),
        "domains": list(workspace.config.domains),
        "artefacts": [
            {
                "name": one.name,
                "kind": one.kind,
                "folder": str(folder),
                "digest": one.digest,
                "made": origin(one),
            }
            for folder, one in finished.items()
        ],
        "unfinished": unfinished,
        "not_begun": _not_begun(workspace),
    }
    rows = [(one.name, one.kind, short(one.digest), origin(one)) for one in finished.values()]
    rows += [(name, "unfinished", "", f"go on with: {how}") for name, how in unfinished.items()]
    rows += [
        (name, "not begun", "", f"in expertctl.yaml; begin with: {how}")
        for name, how in content["not_begun"].items()
    ]
    domains = ", ".join(workspace.config.domains) or "none yet"
    table = Table(("name", "kind", "digest", "made"), rows)
    session.finish(content, f"workspace {workspace.root}", f"domains   {domains}", "", table)


def _not_begun(workspace: Workspace) -> dict[str, str]:
    """Return what `expertctl.yaml` names and nobody has begun, with the command that begins it."""
    begin = {"seed": "expertctl seed"} if not workspace.layout.seed.exists() else {}
    for name in workspace.config.experts:
        if not (workspace.experts / name).exists():
            begin[name] = f"expertctl train {name}"
    for name in workspace.config.merges:
        if not (workspace.generalists / name).exists():
            begin[name] = f"expertctl merge {name}"
    return begin
