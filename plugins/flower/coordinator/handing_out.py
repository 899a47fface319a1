"""The coordinator's Flower app: sends every open request to its owner's node and records the replies.

It runs as long as the server. Experts are uploaded separately, so replies are codes of a few bytes.
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
from .superlink import HEARTBEAT_FILE

TAKE = "train.expert"
"""Flower message type of a request."""
PAUSE_S = 2.0
"""Seconds between two passes."""
RESEND_S = 60.0
"""Seconds after which an unanswered request is sent again."""
TTL_MARGIN_S = 3600.0
"""Lifetime of a message beyond the request's deadline, in seconds."""
NODE_UNAVAILABLE = 5
"""Flower's error code for a node that went offline before it replied; the request is sent again."""
RECORD = "expertctl"
"""Name of the configuration record in messages and replies."""

log = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Send requests until the run is stopped."""
    coordinator = Coordinator(Layout(Path(str(context.run_config["workspace"]))))
    heartbeat = coordinator.files.root / "network" / HEARTBEAT_FILE
    sent: dict[str, tuple[ExpertRequest, float]] = {}  # by request: its content, and when it was sent
    awaited: dict[str, str] = {}  # message -> request
    last_state: object = None
    checked_at = 0.0
    while True:
        nodes = {node.name: node.node_id for node in grid.get_nodes() if node.name}
        ledger = coordinator.files.ledger.path
        stamp = (ledger.stat().st_mtime_ns, ledger.stat().st_size) if ledger.is_file() else (0, 0)
        state = (nodes, stamp)  # changes with every entry of the ledger
        if state != last_state or time.monotonic() - checked_at > RESEND_S:
            last_state, checked_at = state, time.monotonic()
            due = [
                (request, node)
                for name, node in nodes.items()
                for request in coordinator.open_requests(name)
                if _is_due(request, sent)
            ]
            messages = [message_for(request, node) for request, node in due]
            identifiers = grid.push_messages(messages) if messages else []
            for identifier, (request, _) in zip(identifiers, due, strict=False):
                sent[request.id] = (request, time.monotonic())
                awaited[identifier] = request.id
        for reply in grid.pull_messages(list(awaited)) if awaited else []:
            request_id = awaited.pop(reply.metadata.reply_to_message_id, "")
            is_node_gone = reply.has_error() and reply.error.code == NODE_UNAVAILABLE  # no reply of the owner's
            if request_id and not is_node_gone:
                code = code_of(reply)
                log.info("request %s: %s", request_id, code)
                coordinator.files.record_handout(request_id, code, coordinator.now())
                if code == "TAKEN":
                    sent[request_id] = (sent[request_id][0], float("inf"))
        heartbeat.touch()
        time.sleep(PAUSE_S)


def _is_due(request: ExpertRequest, sent: dict[str, tuple[ExpertRequest, float]]) -> bool:
    """Return whether a request is new, renewed, or without a reply for `RESEND_S`."""
    previous = sent.get(request.id)
    return previous is None or previous[0] != request or time.monotonic() - previous[1] > RESEND_S


def message_for(request: ExpertRequest, node: int) -> Message:
    """Return the message that carries a request to a node; it outlives the request."""
    seconds_left = (request.deadline - datetime.now(UTC)).total_seconds()
    content = RecordDict({RECORD: ConfigRecord({"request": json.dumps(request.as_json())})})
    return Message(content, node, TAKE, ttl=max(seconds_left, 0.0) + TTL_MARGIN_S)


def code_of(reply: Message) -> str:
    """Return the code in an owner node's reply, or a code for an invalid reply."""
    if reply.has_error():
        reason = str(reply.error.reason or "")
        return reason if reason.isupper() and len(reason) < 40 else f"FLOWER_{int(reply.error.code)}"
    try:
        code = str(reply.content.config_records[RECORD]["code"])
    except (KeyError, AttributeError):
        return "NO_ANSWER"
    return code if code.replace("_", "").isupper() and len(code) < 40 else "NO_CODE"
