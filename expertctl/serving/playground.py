"""The playground: one page without outside resources."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response


@cache
def _page() -> tuple[str, str]:
    """Return the page, and a policy that lets it run its own script and reach its own server only."""
    html = files(__package__).joinpath("playground.html").read_text(encoding="utf-8")
    sources = {tag: " ".join(_hashes(html, tag)) for tag in ("script", "style")}
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {sources['script']}; "
        f"style-src {sources['style']}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _hashes(html: str, tag: str) -> list[str]:
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" for content in contents]


async def playground_response(request: Request) -> Response:
    """Answer with the page."""
    html, policy = _page()
    return HTMLResponse(
        html,
        headers={
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        },
    )
