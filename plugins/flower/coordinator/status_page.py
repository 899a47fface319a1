"""Status of a federation over HTTP on loopback, read-only: a page, `/metrics` for Prometheus, and `/status.json`."""

from __future__ import annotations

import ipaddress
import json
from contextlib import suppress
from html import escape
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from ....core.errors import UserError
from ....experts.federation.coordinator.coordinator import Coordinator
from ....experts.federation.coordinator.owner_status import OwnerStatus
from ....experts.federation.coordinator.report import FederationReport
from .threaded_server import ThreadedServer

REFRESH_S = 5
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{refresh}"><title>Federation</title>
<style>
body {{ font: 15px system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; margin: 0 0 2rem; }}
th, td {{ text-align: left; padding: .35rem .7rem; border-bottom: 1px solid #ddd; }}
th {{ font-weight: 600; }}
</style></head><body><h1>Federation</h1>
<p>{online} of {members} owners online; {accepted} experts accepted, {refused} deliveries refused.</p>
{tables}</body></html>
"""


class StatusServer(ThreadedServer):
    """HTTP server of the status page, in a separate thread."""

    def __init__(self, coordinator: Coordinator, host: str, port: int) -> None:
        if not is_loopback(host):
            raise UserError(f"the status page has no access control; '{host}' is not an address of this machine only")
        config = uvicorn.Config(
            status_app(coordinator),
            host=host,
            port=port,
            http="h11",
            ws="none",
            loop="asyncio",
            log_level="error",
            access_log=False,
            server_header=False,
        )
        super().__init__(config, "--status")


def is_loopback(host: str) -> bool:
    """Return whether a host is reached from this machine only."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def status_app(coordinator: Coordinator) -> Starlette:
    """Return the application; names of other hosts are refused, by which a web page could read the answers (DNS rebinding)."""

    def report(request: Request) -> Response:
        return HTMLResponse(page(FederationReport.of(coordinator)))

    def metrics(request: Request) -> Response:
        text = FederationReport.of(coordinator).metrics()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def content(request: Request) -> Response:
        text = json.dumps(FederationReport.of(coordinator).as_json(), default=str, indent=2)
        return Response(text, media_type="application/json")

    routes = [Route("/", report), Route("/metrics", metrics), Route("/status.json", content)]
    hosts = Middleware(
        TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "["]
    )  # all of an IPv6 address before ":"
    return Starlette(routes=routes, middleware=[hosts])


def page(report: FederationReport) -> str:
    """Return the page; whatever comes from owners is escaped."""
    events = dict(report.events)
    members = {status.owner: status.online for status in report.owners}
    tables = [_table(("owner", "online", "state", "training", "deadline", "detail"), map(_owner_cells, report.owners))]
    if report.shared:
        rows = [
            (model.name, model.state, f"{model.number} of {model.total}", ", ".join(model.missing))
            for model in report.shared
        ]
        tables.append(_table(("shared model", "state", "rounds", "missing"), rows))
    if report.removed:
        rows = [(entry.owner, entry.at, entry.detail, "") for entry in report.removed]
        tables.append(_table(("removed owner", "time", "key", ""), rows))
    return PAGE.format(
        refresh=REFRESH_S,
        online=sum(members.values()),
        members=len(members),
        accepted=events.get("accepted", 0),
        refused=events.get("refused", 0),
        tables="\n".join(tables),
    )


def _owner_cells(status: OwnerStatus) -> tuple[str, ...]:
    progress, training = status.progress, ""
    if progress is not None and status.state != "accepted":
        training = f"{progress.state} {progress.step} of {progress.steps}"
        training += f" ({progress.code})" if progress.code else ""
    deadline = f"{status.deadline:%Y-%m-%d %H:%M} UTC" if status.deadline is not None else ""
    return status.owner, "yes" if status.online else "no", status.state or "invited", training, deadline, status.detail


def _table(headings: tuple[str, ...], rows: Any) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
