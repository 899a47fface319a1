"""A server of the tests' models in this process, on a port of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from expertctl.core.models.decoding.opening import CheckedDecoder
from expertctl.serving.app import server_app
from expertctl.serving.limits import Limits
from expertctl.serving.models import Loading, ServedModel
from expertctl.serving.server import Server, address_of, bind, stop_engines


@dataclass(frozen=True)
class RunningServer:
    """Where a server is, and its models."""

    url: str
    models: dict[str, ServedModel]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def wait_until_idle(self, name: str, seconds: float = 10) -> None:
        """Wait until no text of a model runs or waits."""
        deadline = time.monotonic() + seconds
        while not all(engine.is_idle for engine in self.models[name].engines):
            assert time.monotonic() < deadline, "the server is still busy"
            time.sleep(0.01)


@contextmanager
def running_server(
    folders: Sequence[Path],
    limits: Limits | None = None,
    *,
    token: str | None = None,
    template: str | None = "chatml",
    decoder: CheckedDecoder | None = None,
) -> Iterator[RunningServer]:
    """Serve model folders by their names on a free port."""
    limits = limits or Limits()
    loading = Loading(chat_template=template, decoder=decoder)
    models = [ServedModel(folder.name, folder, limits, loading) for folder in folders]
    app = server_app(models, limits, token=token)
    with bind("127.0.0.1", 0) as opened:
        opened.listen(128)
        server = Server(app, limits)
        thread = threading.Thread(target=server.run, args=([opened],), daemon=True)
        thread.start()
        try:
            yield RunningServer(address_of(opened), {model.name: model for model in models})
        finally:
            server.should_exit = True
            thread.join(20)
            stop_engines(models, 5)
