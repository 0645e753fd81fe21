"""The command line: parse, call, print, exit code.

Results go to standard output, everything else to standard error; ``--json`` prints one object.
`COMMANDS` tells which module holds which command. What needs torch is imported in the commands
alone, so that help and mistakes are told at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

# Before any library that would look for a hub: only a model named by the user is fetched.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer

from expunge import console
from expunge.cli import compare, demo, evaluate, looking, models, reports, runs
from expunge.errors import ExpungeError, ResourceError
from expunge.version import VERSION

INTERRUPTED = 130
# In the order of `expunge --help`.
COMMANDS: dict[str, Callable[..., None]] = {
    "run": runs.run,
    "demo": demo.demo,
    "compare": compare.compare,
    "joint": runs.joint,
    "sequence": runs.sequence,
    "pick": runs.pick,
    "apply": models.apply,
    "export": models.export,
    "eval": evaluate.evaluate,
    "plan": looking.plan,
    "ls": looking.list_,
    "show": looking.show,
    "card": reports.card_,
    "report": reports.report,
}

app = typer.Typer(
    name="expunge",
    help="Remove a language function from an open-weight causal language model, with evidence.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, command in COMMANDS.items():
    app.command(name)(command)


def print_version(asked: bool) -> None:
    """The version, and no more."""
    if asked:
        typer.echo(f"expunge {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options of no command."""


# What every mistake in the words of a command line is to typer, old or new.
UsageError: type[Any] = typer.BadParameter.__mro__[1]


def main() -> NoReturn:
    """Entry point: errors of the user without a traceback, each kind with its exit code."""
    # A scheduler's polite stop is an interruption like Ctrl-C: state is saved, nothing is lost.
    signal.signal(signal.SIGTERM, console.interrupt)
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except ExpungeError as error:
        console.fail(error)
    except UsageError as error:
        console.fail(console.as_recipe_error(error))
    # typer may turn the first into the second, or into the exit code 130.
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe left; that is its right.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        console.fail(
            ResourceError(
                what="A file or folder cannot be used",
                got=f"{error.strerror}: {error.filename}",
                allowed="paths that the system accepts, and that you may read and write",
                fix="check the path and its permissions",
            )
        )
    sys.exit(code if isinstance(code, int) else 0)
