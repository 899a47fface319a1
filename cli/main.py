"""Entry point of the `expertctl` command: dispatches to the commands and maps errors to exit statuses."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import click

from ..core.artefacts.files import user_fixable_error
from ..core.errors import UserError
from ..core.process.environment import prepare_libraries
from ..core.reporting import printable
from .context import INTERRUPTED, Session
from .group import LazyGroup, options_everywhere
from .output import print_json

# In the order of a project's workflow. Each command is a module in the folder named after its section.
COMMANDS = {
    "Begin": ("init", "quickstart", "doctor", "plugins", "plan"),
    "Make": (
        "seed",
        "data",
        "branch",
        "train",
        "stats",
        "merge",
        "tune",
        "expert",
        "baseline",
        "memory",
        "rename",
        "remove",
    ),
    "Use": ("eval", "generate", "serve", "index", "card", "extract-adapter", "export", "push", "pull"),
    "Federate": ("federate",),
    "Trust": ("show", "log", "verify", "reproduce", "audit"),
}


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        session = ctx.ensure_object(Session)
        session.finish({"version": version("expertctl")}, f"expertctl {version('expertctl')}")
        ctx.exit()


@click.group(
    "expertctl",
    cls=LazyGroup,
    modules=COMMANDS,
    params=options_everywhere(),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
def cli() -> None:
    """Train language-model experts independently and merge them.

    A project is a folder with an expertctl.yaml; `expertctl init demo` creates one. `expertctl quickstart` runs the
    whole workflow on text that is already installed.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: success; 1: an error that the user can fix; 2: wrong usage; 3: success, but a requested check failed;
    130: interrupted. Any other exception is a bug and keeps its traceback.
    """
    prepare_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # terminals without Unicode must not fail
    session = Session()
    try:
        status = cli.main(arguments, prog_name="expertctl", standalone_mode=False, obj=session)
        sys.stdout.flush()
    except UserError as error:
        if session.verbose:
            import traceback

            traceback.print_exc()
        return _fail(session, str(error), error.exit_status)
    except click.ClickException as error:
        error.show()
        if session.json:
            print_json({"error": error.format_message().splitlines()[0]})
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail(session, "interrupted; run the same command again", INTERRUPTED)
    except BrokenPipeError:
        # The reader of the output has exited; keep the interpreter's final flush from failing too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        user_error = user_fixable_error(error)
        if user_error is None:
            raise
        return _fail(session, str(user_error), user_error.exit_status)
    return status if isinstance(status, int) else 0


def _fail(session: Session, message: str, status: int) -> int:
    click.echo(f"Error: {printable(message)}", err=True)
    if session.json:
        print_json({"error": message})
    return status


if __name__ == "__main__":
    sys.exit(main())
