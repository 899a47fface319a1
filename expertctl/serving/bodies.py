"""Reading the JSON body of a request, of limited size and in limited time."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from .errors import RequestError
from .limits import Limits


async def read_json_body(request: Request, limits: Limits) -> dict[str, Any]:
    """Return the JSON object that a request holds; raises `RequestError` for any other body."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.body_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = await _read(request, limits)
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {limits.body_seconds:g} seconds") from None
    except ClientDisconnect:
        raise RequestError(400, "the client disconnected") from None
    return parse_object(body)


async def _read(request: Request, limits: Limits) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.body_bytes:
            raise _too_large(limits)
    return bytes(body)


def _too_large(limits: Limits) -> RequestError:
    return RequestError(413, f"the body is larger than {limits.body_bytes:,} bytes, the limit of this server")


def parse_object(body: bytes) -> dict[str, Any]:
    """Return a JSON object; raises `RequestError` for invalid UTF-8, invalid JSON and anything else that is no object."""
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not valid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise RequestError(400, "the body's JSON is nested too deeply") from None
    except ValueError as error:  # also a number with thousands of digits
        raise RequestError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RequestError(400, "the body is not a JSON object")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
