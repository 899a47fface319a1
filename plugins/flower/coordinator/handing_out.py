"""The coordinator's Flower app: hands every open request to its owner's node, once in its life, and notes who has taken it.

Runs as long as the server does. Experts do not come this way, so replies are codes of a few bytes.
"""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from ....core.artefacts.layout import Layout
from ....experts.federation.coordinator.coordinator import Coordinator
from ....experts.federation.protocol.requests import ExpertRequest
from .superlink import SIGN_OF_LIFE

TAKE = "train.expert"
PAUSE_S = 2.0
AGAIN_S = 60.0
"""After which a request that nobody has taken is handed out again."""
SPARE_S = 3600.0
"""How long messages live beyond a request's deadline."""
RECORD = "expertctl"

log = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Hand out requests until the run is stopped."""
    coordinator = Coordinator(Layout(Path(str(context.run_config["workspace"]))))
    sign = coordinator.root / "network" / SIGN_OF_LIFE
    handed: dict[str, tuple[ExpertRequest, float]] = {}
    waiting: dict[str, str] = {}
    seen: object = None
    looked = 0.0
    while True:
        nodes = {node.name: node.node_id for node in grid.get_nodes() if node.name}
        now_seen = (nodes, _stamp(coordinator))
        if now_seen != seen or time.monotonic() - looked > AGAIN_S:
            seen, looked = now_seen, time.monotonic()
            due = [
                (request, node)
                for name, node in nodes.items()
                for request in coordinator.open_requests(name)
                if _is_due(request, handed)
            ]
            messages = [message_for(request, node) for request, node in due]
            sent = grid.push_messages(messages) if messages else []
            for identifier, (request, _) in zip(sent, due, strict=False):
                handed[request.id] = (request, time.monotonic())
                waiting[identifier] = request.id
        for reply in grid.pull_messages(list(waiting)) if waiting else []:
            request_id = waiting.pop(reply.metadata.reply_to_message_id, "")
            if request_id:
                code = code_of(reply)
                log.info("request %s: %s", request_id, code)
                coordinator.note_handed(request_id, code)
                if code == "TAKEN":
                    handed[request_id] = (handed[request_id][0], float("inf"))
        sign.touch()
        time.sleep(PAUSE_S)


def _stamp(coordinator: Coordinator) -> tuple[int, int]:
    """Return what changes with every line of the ledger."""
    path = coordinator.ledger.path
    found = path.stat() if path.is_file() else None
    return (found.st_mtime_ns, found.st_size) if found is not None else (0, 0)


def _is_due(request: ExpertRequest, handed: dict[str, tuple[ExpertRequest, float]]) -> bool:
    """Tell whether a request is new, was renewed, or was handed out long ago without an answer."""
    before = handed.get(request.id)
    return before is None or before[0] != request or time.monotonic() - before[1] > AGAIN_S


def message_for(request: ExpertRequest, node: int) -> Message:
    """Return what carries a request to a node; it lives longer than the request."""
    left = (request.deadline - datetime.now(UTC)).total_seconds()
    content = RecordDict({RECORD: ConfigRecord({"request": json.dumps(request.as_json())})})
    return Message(content, node, TAKE, ttl=max(left, 0.0) + SPARE_S)


def code_of(reply: Message) -> str:
    """Return what an owner's node says: a code, whatever it sends."""
    if reply.has_error():
        reason = str(reply.error.reason or "")
        return reason if reason.isupper() and len(reason) < 40 else f"FLOWER_{int(reply.error.code)}"
    try:
        code = str(reply.content.config_records[RECORD]["code"])
    except (KeyError, AttributeError):
        return "NO_ANSWER"
    return code if code.replace("_", "").isupper() and len(code) < 40 else "NO_CODE"
