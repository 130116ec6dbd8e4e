# SPDX-License-Identifier: Apache-2.0
"""The application: commands, `--debug`, and errors as one line with exit status 2."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from typing import Annotated, NoReturn

import typer

from deltaweave import __version__
from deltaweave.formats import DeltaweaveError

__all__ = ["COMMANDS", "application", "main"]

ERROR_STATUS = 2
# What typer makes of Ctrl-C before we see it.
INTERRUPTED_STATUS = 130

# A command's line in the list of all. Its module is imported when it is asked for: torch and transformers take seconds.
COMMANDS = {
    "compress": "Compress a fine-tune into a delta of its base.",
    "inspect": "Show what a file holds: a delta's bands, bytes, ratios and errors per record; a fusion's experts and "
    "gate.",
    "verify": "Check a file's integrity, its base, and a delta's errors or a fusion's experts; exit status 1 if a "
    "check fails.",
    "apply": "Write base + delta as a dense Hugging Face checkpoint.",
    "generate": "Write text with base + delta, as it comes; or with several deltas and fusions, in one batch.",
    "compare": "Compare deltas with their fine-tune: bytes, task accuracy, perplexity, KL.",
    "fuse": "Put LoRAs and deltas of one base into a fusion file, with weights of your choice or a released gate.",
    "gate": "Train gates that weigh LoRAs and deltas for every layer and token, and look into them.",
    "bench": "Measure an engine: time to first token, time between tokens, tokens a second.",
    "build": "Build a TensorRT engine of a base, in which fine-tunes come and go without another build.",
    "validate": "Check that base + delta still is the fine-tune, on prompts; exit status 1 if a threshold is broken.",
}


def application(wanted: Collection[str] = tuple(COMMANDS)) -> typer.Typer:
    """All commands, of which those in `wanted` can be run; the others are listed."""
    app = typer.Typer(
        name="deltaweave",
        help="Compress fine-tunes into mixed-precision deltas of their base, check them, and run them.",
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    for name, summary in COMMANDS.items():
        if name not in wanted:
            app.command(name, help=summary)(_listed)
            continue
        module = importlib.import_module(f"deltaweave.cli.{name}")
        if hasattr(module, f"{name}_app"):
            app.add_typer(getattr(module, f"{name}_app"), name=name)
        else:
            app.command(name, epilog=getattr(module, "EXAMPLES", None))(getattr(module, f"{name}_command"))
    return app


def _listed() -> None:
    """Stands for a command that is not run."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"deltaweave {__version__}")
        raise typer.Exit


def _options(
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
    completes = "_DELTAWEAVE_COMPLETE" in os.environ  # the words are elsewhere then
    try:
        app = application() if completes else application({word for word in words[:1] if word in COMMANDS})
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
        if not error.format_message():  # the help has been shown
            return ERROR_STATUS
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
