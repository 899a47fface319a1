"""Registers members at Flower's server: `python -m expertctl.plugins.flower.coordinator.registering CONNECTION`.

Flower's own command registers one member and takes a second to start; this process registers all with one connection. It
reads `{"register": {NAME: KEY}, "unregister": [NODE]}` and prints `{"registered": {NAME: NODE}, "failed": {NAME: REASON}}`.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import Any


def register(connection: str, members: dict[str, str], nodes: list[str]) -> dict[str, Any]:
    """Unregister nodes, then register members by their keys; a member that fails does not affect the others."""
    import click
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.cli.utils import flwr_cli_exc_handler, init_http_client_from_connection
    from flwr.proto.control_pb2 import RegisterNodeRequest, UnregisterNodeRequest

    registered: dict[str, str] = {}
    failed: dict[str, str] = {}
    client = init_http_client_from_connection(read_superlink_connection(connection))
    try:
        for node in nodes:
            with suppress(click.ClickException), flwr_cli_exc_handler():  # an earlier call may have unregistered it
                client.UnregisterNode(UnregisterNodeRequest(node_id=int(node)))
        for name, line in members.items():
            key = load_ssh_public_key(line.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            try:
                with flwr_cli_exc_handler():
                    response = client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
            except click.ClickException as error:
                failed[name] = error.format_message()
                continue
            registered[name] = str(response.node_id)
    finally:
        client.close()
    return {"registered": registered, "failed": failed}


def main() -> None:
    """Read the members from standard input, and print what became of each."""
    content = json.load(sys.stdin)
    print(json.dumps(register(sys.argv[1], content["register"], content["unregister"])))


if __name__ == "__main__":
    main()
