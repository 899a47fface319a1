"""`expertctl serve`: models behind the protocol of OpenAI's API, with a page to try them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...core.errors import UserError
from ..context import Session, pass_session
from ..group import cli_command
from ..options import Number, integer, option, path, with_decoder, with_device_map, with_quantise


@cli_command("serve", example="expertctl serve forest law --port 8000")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@option("--host", "HOST", "Address to listen on; any but this machine's own needs a token.", default="127.0.0.1")
@integer("--port", "Port to listen on; 0 takes a free one.", least=0, default=8000, metavar="PORT")
@path(
    "--token-file", "FILE", "File with the token that requests need. Default: the variable EXPERTCTL_TOKEN.", file=True
)
@option("--chat-template", "NAME|FILE", "Chat template in place of the models' own.")
@integer("--max-tokens", "Longest continuation of a request, in tokens.", default=4096)
@integer("--concurrency", "Texts of a model that are generated together.", default=32)
@integer("--queue", "Texts of a model that may wait; further requests get status 429.", default=256)
@option("--request-seconds", "S", "Time limit of a request.", type=Number(min=0, min_open=True), default=300.0)
@integer("--body-bytes", "Largest body of a request.", default=4 << 20)
@option("--grace-seconds", "S", "Time for running requests once the server stops.", type=Number(min=0), default=30.0)
@with_device_map
@with_quantise
@with_decoder
@pass_session
def command(
    session: Session,
    models: tuple[str, ...],
    host: str,
    port: int,
    token_file: Path | None,
    chat_template: str | None,
    max_tokens: int,
    concurrency: int,
    queue: int,
    request_seconds: float,
    body_bytes: int,
    grace_seconds: float,
    device_map: str | None,
    quantise: str | None,
    decoder: str | None,
    decoder_options: dict[str, Any],
) -> None:
    """Serve models to clients of OpenAI's API until Ctrl-C.

    MODEL is a name in this workspace or a folder. The server's page lets you try the models in a browser.
    """
    folders = {Path(model).name: session.artefact(model) for model in models}
    if len(folders) < len(models):
        raise UserError("two models have the same name; give each one once")
    try:
        from expertctl.serving.app import server_app
        from expertctl.serving.limits import Limits
        from expertctl.serving.models import Loading, ServedModel
        from expertctl.serving.server import address_of, bind, is_loopback, read_token, run_server
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'expertctl[serve]'") from None
    checked = None
    if decoder is not None:
        from ...core.models.decoding.opening import DecoderChoice, check_decoder

        checked = check_decoder(
            DecoderChoice(decoder, decoder_options, session.artefact, session.memory, session.index)
        )
        if checked.decoder.wrap is None:
            raise UserError(
                f"decoder '{decoder}' chooses among finished samples, which a server cannot stream; use generate"
            )
    elif decoder_options:
        raise click.UsageError("--decoder-option needs --decoder")
    limits = Limits(
        max_tokens=max_tokens,
        rows=concurrency,
        waiting=queue,
        request_seconds=request_seconds,
        body_bytes=body_bytes,
        grace_seconds=grace_seconds,
    )
    token = read_token(token_file, host)
    with bind(host, port) as opened:
        loading = Loading(device_map=device_map, quantise=quantise, chat_template=chat_template, decoder=checked)
        served = [ServedModel(name, folder, limits, loading) for name, folder in folders.items()]
        app = server_app(served, limits, token=token, is_local=is_loopback(host))
        url = address_of(opened)

        def ready() -> None:
            content: dict[str, Any] = {"url": url, "models": list(folders), "token": token is not None}
            session.finish(content, f"serving {', '.join(folders)} at {url} (Ctrl-C stops)")

        run_server(app, served, limits, opened, ready)
    session.note("stopped")
