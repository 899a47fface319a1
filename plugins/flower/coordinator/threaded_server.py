"""An HTTP server of uvicorn in a thread of its own."""

from __future__ import annotations

import threading
from contextlib import suppress

import uvicorn

from ....core.errors import UserError


class ThreadedServer:
    """Opens a port, serves in a separate thread, and closes; `option` is the user's option for the address."""

    def __init__(self, config: uvicorn.Config, option: str) -> None:
        self.server = uvicorn.Server(config)
        self._address, self._option = f"{config.host}:{config.port}", option
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def run(self) -> None:
        """Serve until the end, in the server's thread."""
        self.server.run()

    def _serve(self) -> None:
        with suppress(SystemExit):  # uvicorn exits if it cannot listen
            self.run()

    def open(self) -> int:
        """Start serving and return the port; raises `UserError` if it cannot listen."""
        self._thread.start()
        while not self.server.started:
            self._thread.join(0.05)
            if not self._thread.is_alive():
                raise UserError(
                    f"cannot listen on {self._address}; another server may use the port: choose another with {self._option}"
                )
        port: int = self.server.servers[0].sockets[0].getsockname()[1]
        return port

    def close(self) -> None:
        """Stop the server, giving open requests a few seconds."""
        self.server.should_exit = True
        self._thread.join(10)
