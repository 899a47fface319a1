"""The queue of a model: clients take turns, and each client's requests keep their order."""

from __future__ import annotations

from collections import OrderedDict, deque

from .requests import Job


class FairQueue:
    """Waiting jobs by client; not safe for threads without a lock."""

    def __init__(self) -> None:
        self._by_client: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def put(self, job: Job) -> None:
        """Add a job after those of its client."""
        self._by_client.setdefault(job.client, deque()).append(job)

    def pop(self) -> Job:
        """Remove and return the first job of the client whose turn it is, which is then the last in turn."""
        client, jobs = next(iter(self._by_client.items()))
        job = jobs.popleft()
        del self._by_client[client]
        if jobs:
            self._by_client[client] = jobs
        return job
