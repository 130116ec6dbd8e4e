# SPDX-License-Identifier: Apache-2.0
"""The application: commands, `--debug`, and errors as one line with exit status 2."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from deltaweave import __version__
from deltaweave.cli.apply import apply_command
from deltaweave.cli.bench import bench_command
from deltaweave.cli.build import BUILD_EXAMPLES, build_command
from deltaweave.cli.compare import compare_command
from deltaweave.cli.compress import COMPRESS_EXAMPLES, compress_command
from deltaweave.cli.fuse import fuse_command
from deltaweave.cli.gate import gate_app
from deltaweave.cli.generate import generate_command
from deltaweave.cli.inspect import inspect_command
from deltaweave.cli.validate import VALIDATE_EXAMPLES, validate_command
from deltaweave.cli.verify import verify_command
from deltaweave.formats import DeltaweaveError

__all__ = ["app", "main"]

ERROR_STATUS = 2
# What typer makes of Ctrl-C before we see it.
INTERRUPTED_STATUS = 130

app = typer.Typer(
    name="deltaweave",
    help="Compress fine-tunes into mixed-precision deltas of their base, check them, and run them.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("compress", epilog=COMPRESS_EXAMPLES)(compress_command)
app.command("inspect")(inspect_command)
app.command("verify")(verify_command)
app.command("apply")(apply_command)
app.command("generate")(generate_command)
app.command("compare")(compare_command)
app.command("fuse")(fuse_command)
app.add_typer(gate_app, name="gate")
app.command("bench")(bench_command)
app.command("build", epilog=BUILD_EXAMPLES)(build_command)
app.command("validate", epilog=VALIDATE_EXAMPLES)(validate_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"deltaweave {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Options that stand before the command; `--debug` may stand anywhere."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits: 0 done, 1 a check failed, 2 an error, told in one line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    # Models and tokenizers are folders here: nothing may look for them on a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        status = app(words, prog_name="deltaweave", standalone_mode=False)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if debug:
            traceback.print_exc()
        sys.exit(_explain(error))
    if status == INTERRUPTED_STATUS:
        sys.exit(_explain(KeyboardInterrupt()))
    sys.exit(status if isinstance(status, int) else 0)


def _explain(error: BaseException) -> int:
    """Prints one line for an error that a user can mend, and returns the exit status; anything else is raised."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, DeltaweaveError):
        message = str(error)
    elif isinstance(error, (KeyboardInterrupt, typer.Abort)):
        message = "interrupted; finished layers are kept, the same command goes on from there"
    elif isinstance(error, typer.TyperException):
        message = f"{error.format_message()} (deltaweave COMMAND --help lists the options)"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message = f"{error.filename or 'output'}: no space left on the device; finished layers are kept"
    elif isinstance(error, OSError) and error.filename:
        message = f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError):
        message = "out of memory; --samples or --sequence-length can be lowered"
    else:
        raise error
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return ERROR_STATUS
