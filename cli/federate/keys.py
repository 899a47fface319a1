"""`expertctl federate keys` and `rotate-key`: an owner's key pair and its replacement."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...core.errors import UserError
from ..context import Session, pass_session
from ..group import cli_command
from ..options import option, path
from .options import coordinator_of, default_state, state_option

if TYPE_CHECKING:
    from ...experts.federation.protocol.keys import OwnerKey
    from ...experts.federation.protocol.rotation import KeyRotation


@cli_command("keys", example="expertctl federate keys")
@state_option
@pass_session
def keys(session: Session, state: Path | None) -> None:
    """Make an owner's key pair; the coordinator needs the public key.

    An existing key pair is kept and shown.
    """
    from ...experts.federation.owner.policy import POLICY_FILE, write_policy_template
    from ...experts.federation.protocol.keys import KEY_FILE, PUBLIC_FILE, make_key, read_key

    folder = state or default_state()
    key = read_key(folder) if (folder / KEY_FILE).exists() else make_key(folder)
    write_policy_template(folder)
    content = {
        "private": str(key.path),
        "public": str(folder / PUBLIC_FILE),
        "line": key.public.line,
        "fingerprint": key.public.fingerprint,
        "policy": str(folder / POLICY_FILE),
    }
    session.finish(
        content,
        f"send this file to the coordinator: {folder / PUBLIC_FILE}",
        f"fingerprint: {key.public.fingerprint}",
        f"limits on what you will be asked for: {folder / POLICY_FILE}",
    )


@cli_command("rotate-key", example="expertctl federate rotate-key --server hub.example.org:8443 --ca ca.crt")
@option("--server", "HOST:PORT", "Address of the coordinator, which is told at once.")
@path("--ca", "FILE", "The coordinator's ca.crt; required with --server.")
@path("-o, --output", "FILE", "Without --server: file for the coordinator, who runs `accept-key` with it.")
@state_option
@pass_session
def rotate_key(session: Session, server: str | None, ca: Path | None, output: Path | None, state: Path | None) -> None:
    """Replace an owner's key pair; open requests follow the new key.

    Stop `join` first. The old pair is kept beside the new one, with the ending `.old`.
    """
    from ...core.artefacts.files import exclusive, refuse_existing, write_json
    from ...experts.federation.owner.owner import Owner

    if (server is None) == (output is None) or (server is None) != (ca is None):
        raise click.UsageError("give --server and --ca, or -o")
    owner = Owner((state or default_state()).expanduser().resolve())

    def send(rotation: KeyRotation, new: OwnerKey) -> None:
        if output is not None:
            refuse_existing(output, force=False, what="key rotation")
            write_json(output, rotation.as_json())
            return
        from ...plugins.flower.owner.coordinator_client import CoordinatorClient, Declined, Unreachable

        assert server is not None
        assert ca is not None
        with (
            closing(CoordinatorClient(server, ca, owner.key())) as client,
            closing(CoordinatorClient(server, ca, new)) as renewed,
        ):
            try:
                try:
                    client.rotate_key(rotation)
                except Declined as error:
                    if error.code != "UNKNOWN_KEY":
                        raise
                    renewed.hello()  # an earlier try may have been killed after the coordinator took the new key
            except (Unreachable, Declined) as error:
                raise UserError(f"the key is not replaced: the coordinator answered {error}") from None

    with exclusive(owner.state / ".locks" / "join", f"the owner's state {owner.state}"):
        key = owner.rotate_key(send)
    lines = [f"the new key: {key.public.fingerprint}"]
    if output is not None:
        lines.append(f"send this file to the coordinator before the next delivery: {output}")
    session.finish({"fingerprint": key.public.fingerprint, "output": str(output) if output else None}, *lines)


@cli_command("accept-key", example="expertctl federate accept-key rotation.json")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@pass_session
def accept_key(session: Session, file: Path) -> None:
    """Replace a member's key with a file of `rotate-key`.

    Both keys have signed it, so it may come over any channel.
    """
    from ...core.artefacts.files import read_json, require_regular
    from ...experts.federation.protocol.rotation import KeyRotation

    if require_regular(file).stat().st_size > 10_000:
        raise UserError(f"{file} is too large for a key rotation")
    member = coordinator_of(session).rotate_key(KeyRotation.of_json(read_json(file)))
    session.finish(
        {"name": member.name, "fingerprint": member.key.fingerprint},
        f"'{member.name}' has another key: {member.key.fingerprint}",
    )
