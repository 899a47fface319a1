"""Valid messages between coordinator and owners."""

from __future__ import annotations

from datetime import UTC, datetime

from expertctl.core.manifests.statements import DataStatement
from expertctl.experts.federation.protocol.delivery import SignedStatement, Statement
from expertctl.experts.federation.protocol.parts import FileParts
from expertctl.experts.federation.protocol.requests import ExpertRequest, Progress, Recipe, RoundOf

IDENTIFIER, DIGEST = "0123456789abcdef", "ab" * 32
FINGERPRINT = f"SHA256:{'x' * 43}"
FILE = FileParts("config.json", 1, DIGEST, (DIGEST,))
ROUND = RoundOf("campus", IDENTIFIER, 0, 2, 5)
RECIPE = Recipe("all", round=ROUND)
REQUEST = ExpertRequest(IDENTIFIER, "site-a", FINGERPRINT, DIGEST, (FILE,), RECIPE, datetime(2030, 1, 1, tzinfo=UTC))
STATEMENT = Statement(IDENTIFIER, "site-a", DIGEST, RECIPE.digest, DIGEST, (FILE,), DataStatement(), None)
SIGNED = SignedStatement(STATEMENT, "x")
PROGRESS = Progress("training", 3, 10, 2.5, 60.0)
