"""`expertctl doctor`: check the machine, the installation and the workspace."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from ...core.artefacts.files import is_alive
from ..context import Session
from ..group import cli_command
from ..output import Table

if TYPE_CHECKING:
    from expertctl.workspace import Workspace

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scikit-learn", "pydantic", "pluggy")
MIN_FREE_BYTES = 1 << 30
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Literal["ok", "note", "wrong"]
    check: str
    result: str


@cli_command("doctor", example="expertctl doctor")
@click.pass_context
def command(ctx: click.Context) -> int:
    """Check the machine, the installation and the workspace.

    The exit status is 1 if a check fails.
    """
    session = ctx.ensure_object(Session)
    findings = [*_machine(), *_libraries(), *_devices(), *_plugins(ctx), *_workspace(session)]
    wrong = [finding for finding in findings if finding.level == "wrong"]
    rows = [(finding.level, finding.check, finding.result) for finding in findings]
    session.finish(
        {"healthy": not wrong, "findings": [asdict(finding) for finding in findings]},
        Table(("", "", ""), rows, headings=False),
        f"problems found: {len(wrong)}" if wrong else "no problems found",
    )
    return 1 if wrong else 0


# --- machine and installation ---


def _machine() -> Iterator[Finding]:
    from ...core.process.compute import available_cores

    yield Finding("ok", "python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("ok", "system", f"{platform.system()} {platform.machine()}")
    yield Finding("ok", "cores", str(available_cores()))
    with suppress(AttributeError, ValueError, OSError):  # not available on every system
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield Finding("ok", "memory", f"{memory / GIB:.1f} GiB")


def _libraries() -> Iterator[Finding]:
    from ...core.artefacts.versions import package_version

    yield Finding("ok", "expertctl", package_version("expertctl"))
    for name in LIBRARIES:
        version = package_version(name)
        if version == "not installed":
            yield Finding("wrong", name, f"{version}; install it: pip install {name}")
        else:
            yield Finding("ok", name, version)


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken installation can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        yield Finding("wrong", "torch", f"cannot be imported: {reason}")
        return
    if not torch.cuda.is_available():
        yield Finding("ok", "devices", "cpu; no GPU that torch can use")
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / GIB
        yield Finding("ok", f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {memory:.1f} GiB")


def _plugins(ctx: click.Context) -> Iterator[Finding]:
    """Call every hook once, which also reports plugins whose hooks raise an error."""
    from ...core.hooks.manager import OFFER_KINDS, installed_plugins

    plugins = installed_plugins()
    for kind in OFFER_KINDS:
        plugins.offers(kind)
    root = ctx.find_root().command
    if isinstance(root, click.Group):
        root.list_commands(ctx)
    third_party = [plugin for plugin in plugins.plugins() if plugin.distribution != "expertctl"]
    num_builtin = len(plugins.plugins()) - len(third_party)
    yield Finding("ok", "plugins", f"{num_builtin} built in, {len(third_party)} third-party")
    for plugin in third_party:
        description = f"{plugin.distribution} {plugin.version}: {', '.join(plugin.hooks)}"
        yield Finding("ok", f"plugin {plugin.name}", description)
    for problem in plugins.problems:
        yield Finding("wrong", f"plugin {problem.plugin}", f"({problem.distribution}) {problem.reason}")


# --- the workspace ---


def _workspace(session: Session) -> Iterator[Finding]:
    from ...core.errors import UserError

    try:
        workspace = session.open()
    except UserError as error:
        if session.workspace is None:
            yield Finding("note", "workspace", "none in this folder")
        else:
            yield Finding("wrong", "workspace", str(error))
        return
    yield Finding("ok", "workspace", str(workspace.root))
    free = shutil.disk_usage(workspace.root).free
    yield Finding("ok" if free >= MIN_FREE_BYTES else "wrong", "disk", f"{free / GIB:.1f} GiB free")
    if not os.access(workspace.root, os.W_OK):
        yield Finding("wrong", "workspace", f"{workspace.root} is not writable; check the owner of the folder")
    try:
        config = workspace.config
    except UserError as error:
        yield Finding("wrong", "expertctl.yaml", str(error))
        return
    yield Finding("ok", "expertctl.yaml", f"{len(config.domains)} domains, {len(config.experts)} experts")
    yield from _sources(workspace)
    yield from _state(workspace)


def _sources(workspace: Workspace) -> Iterator[Finding]:
    """Check that the text of every domain exists, and that the seed's tokenizer keeps it."""
    from ...core.remote.urls import is_url
    from ...experts.text.corpora import lost_text

    for name, domain in workspace.config.domains.items():
        for source in (domain.path, domain.train, domain.valid, domain.test):
            if source is not None and not is_url(source) and not (workspace.root / Path(source).expanduser()).exists():
                yield Finding("wrong", f"domain {name}", f"{source} does not exist")
    has_tokenizer = (workspace.layout.seed / "config.json").is_file()
    for name, prepared in workspace.data.prepared().items() if has_tokenizer else ():
        if prepared is not None and (lost := lost_text(prepared)):
            yield Finding("note", f"domain {name}", lost)


def _state(workspace: Workspace) -> Iterator[Finding]:
    """Report unfinished runs, locks of other processes, and leftovers of killed commands."""
    for name, resume_command in workspace.unfinished().items():
        yield Finding("note", f"unfinished {name}", f"resume with: {resume_command}")
    for lock in sorted((workspace.root / ".locks").glob("*.lock")):
        if _is_held(lock):
            yield Finding("note", "in progress", f"another process holds {lock.name}")
    for folder in (workspace.root, workspace.experts.folder, workspace.generalists.folder, workspace.layout.baselines):
        for path in sorted((*folder.glob(".*.partial-*"), *folder.glob(".*.discarded-*"))):
            if not is_alive(path.name.rpartition("-")[2]):
                yield Finding("note", "leftover", f"{path}, from a killed command; you can delete it")


def _is_held(lock: Path) -> bool:
    """Return whether a process holds the lock; a lock file can outlive its process."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(lock, timeout=0):
            return False
    except (Timeout, OSError):
        return True
