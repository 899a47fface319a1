"""Reasons for which a delivery is refused."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

MAX_DETAIL = 300
"""Longest detail of a refusal, in letters; it may quote what an owner sent."""


class RefusalCode(Enum):
    """Reasons for a refusal; the code crosses the network, each side has its own sentence."""

    SIGNATURE = "the statement is not signed by the owner's key"
    SOMEONE_ELSES = "the statement names another request, owner, seed or recipe"
    REPLAY = "the same expert was accepted before"
    LATE = "the deadline has passed"
    TOO_OFTEN = "deliveries for the request were refused too often; the coordinator has to ask again"
    WITHDRAWN = "the coordinator has withdrawn the request"
    FILES = "files are missing or unexpected"
    TOO_LARGE = "the delivery is larger than an expert of this seed can be"
    DIGEST = "the files do not match the manifest"
    MANIFEST = "the manifest does not match the request"
    SHAPES = "a tensor's name or shape differs from the seed's"
    DTYPES = "a tensor's dtype differs from the seed's"
    FROZEN = "a frozen tensor has changed"
    NOT_FINITE = "a tensor has values that are not finite"
    NORM = "a tensor differs from the seed's by more than training explains"
    PRIVACY = "the privacy budget spent exceeds the requested one"
    HELD_OUT = "the loss on public text is too high"


@dataclass(frozen=True)
class Refusal:
    """The refusal of one delivery."""

    code: RefusalCode
    detail: str = ""
    """Details for the coordinator; not sent to the owner."""

    def __str__(self) -> str:
        return f"{self.code.value}{f' ({self.detail})' if self.detail else ''}"


class Refused(Exception):
    """Raised by a check that refuses a delivery."""

    def __init__(self, code: RefusalCode, detail: str = "") -> None:
        super().__init__(code.name)
        self.refusal = Refusal(code, detail.encode("ascii", "backslashreplace").decode()[:MAX_DETAIL])
