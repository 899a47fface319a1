"""The owner's Flower app: stores a request in the owner's state folder and replies at once.

Training runs in the owner's own process. The reply is always a code, never a message or a path.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ....core.errors import UserError
from ....experts.federation.owner.owner import Owner
from ....experts.federation.protocol.requests import ExpertRequest
from ..coordinator.handing_out import RECORD
from .guarded_client import STATE_SETTING

log = logging.getLogger("flwr")
app = ClientApp()


@app.train("expert")
def take(message: Message, context: Context) -> Message:
    """Store the request in a message and reply with `TAKEN`, or with a code for an error."""
    try:
        code = store_request(message, Path(str(context.node_config[STATE_SETTING])))
    except UserError as error:
        log.warning("a request was not stored: %s", error)  # stays in the owner's log
        code = "NOT_TAKEN"
    except Exception:  # its message may hold paths or text
        log.exception("a request was not stored")
        code = "FAILED"
    return Message(RecordDict({RECORD: ConfigRecord({"code": code})}), reply_to=message)


def store_request(message: Message, state: Path) -> str:
    """Store a request and return `TAKEN`; a request that was refused before is delivered again."""
    owner = Owner(state)
    request = ExpertRequest.of_json(json.loads(str(message.content.config_records[RECORD]["request"])))
    owner.take(request)
    if owner.outcome(request) not in (None, "accepted", "DECLINED"):
        owner.forget_outcome(request)
    return "TAKEN"
