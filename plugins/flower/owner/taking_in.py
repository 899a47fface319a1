"""The owner's Flower app: remembers a request in the owner's state folder and answers at once.

Training goes on in the owner's own process. What is answered is a code, never a text or a path, whatever goes wrong.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
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
    """Take a request in."""
    return _answer(message, lambda: take_in(message, Path(str(context.node_config[STATE_SETTING]))))


def take_in(message: Message, state: Path) -> str:
    """Remember a request; one that was refused before and is asked for again is delivered again."""
    owner = Owner(state)
    request = ExpertRequest.of_json(json.loads(_text(message, "request")))
    owner.take(request)
    if owner.outcome(request.id) not in (None, "accepted"):
        (state / "outcomes" / f"{request.id}.json").unlink()
    return "TAKEN"


def _text(message: Message, name: str) -> str:
    return str(message.content.config_records[RECORD][name])


def _answer(message: Message, work: Callable[[], str]) -> Message:
    try:
        code = work()
    except UserError as error:
        log.warning("a request was not taken: %s", error)  # stays in the owner's log
        code = "NOT_TAKEN"
    except Exception:  # whatever it is, its words may hold paths or text
        log.exception("a request was not taken")
        code = "FAILED"
    return Message(RecordDict({RECORD: ConfigRecord({"code": code})}), reply_to=message)
