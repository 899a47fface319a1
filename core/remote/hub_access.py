"""Permission to contact the Hugging Face hub, for commands in which the user names a remote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserError
from ..process.environment import OFFLINE_BY_DEFAULT, OFFLINE_SETTING

TIMEOUT_S = 120
"""Longest wait for a connection, and between two pieces of an answer; the library itself would wait for ever."""


@contextmanager
def hub_allowed() -> Iterator[None]:
    """Let huggingface_hub use the network within the block; raises `UserError` if the user set `HF_HUB_OFFLINE`.

    The command line itself sets that variable for its process, so that nothing else contacts the hub.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    if constants.HF_HUB_OFFLINE and os.environ.get(OFFLINE_BY_DEFAULT) != "1":
        raise UserError(
            f"the Hugging Face hub is not contacted while {OFFLINE_SETTING} is set; unset it, or set {OFFLINE_SETTING}=0"
        ) from ConnectionError(OFFLINE_SETTING)  # so that a copy of the workspace is used, if there is one
    offline, make_client = constants.HF_HUB_OFFLINE, _http._GLOBAL_CLIENT_FACTORY

    def make_client_with_timeout() -> Any:
        client = make_client()
        client.timeout = TIMEOUT_S
        return client

    constants.HF_HUB_OFFLINE = False
    set_client_factory(make_client_with_timeout)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        set_client_factory(make_client)
