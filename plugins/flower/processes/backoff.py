"""Back-off for everything that is retried: processes, connections and training runs."""

from __future__ import annotations

PAUSES_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)


def backoff_s(failures: int) -> float:
    """Return the pause in seconds before the next attempt after 1 or more failures in a row."""
    return PAUSES_S[min(failures, len(PAUSES_S)) - 1]
