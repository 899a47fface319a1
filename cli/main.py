"""The command `expertctl`: finds the command that was asked for, and turns what goes wrong into exit statuses."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import click

from ..core.artefacts.files import mendable
from ..core.errors import UserError
from ..core.process.environment import prepare_libraries
from .context import Session
from .group import LazyGroup, options_everywhere
from .output import print_json

# In the order in which a project meets them; each is a module in the folder of its section.
COMMANDS = {
    "Begin": ("init", "quickstart", "doctor", "plugins"),
    "Make": ("seed", "data", "branch", "train", "stats", "merge", "tune", "expert", "baseline"),
    "Use": ("eval", "generate", "card", "extract-adapter"),
    "Federate": ("federate",),
    "Trust": ("show", "log", "verify", "reproduce", "audit"),
}
INTERRUPTED = 130


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"expertctl {version('expertctl')}")
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
    is_eager=True,
    callback=_print_version,
    help="Print the version.",
)
def cli() -> None:
    """Train language-model experts apart, merge them into one model.

    A project is a folder with expertctl.yaml: `expertctl init demo` makes one, `expertctl quickstart` walks
    the whole way on text that is installed already.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0 done; 1 something the user can mend; 2 usage; 3 done, but a gate that was asked for does not hold; 130
    interrupted. Anything unexpected is a bug and keeps its traceback.
    """
    prepare_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Unicode must not end a command
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
        # Whoever read the output has gone; the interpreter's last flush must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        trouble = mendable(error)
        if trouble is None:
            raise
        return _fail(session, str(trouble), trouble.exit_status)
    return status if isinstance(status, int) else 0


def _fail(session: Session, message: str, status: int) -> int:
    click.echo(f"Error: {message}", err=True)
    if session.json:
        print_json({"error": message})
    return status


if __name__ == "__main__":
    sys.exit(main())
