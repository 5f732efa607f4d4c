"""The command line: `xaibatch evaluate | explain | query | report | ...`; a user error is one line and exit code 2."""

import sys
from pathlib import Path

import typer

from xaibatch.cli import evaluate, explain, listing, results, simulate, train
from xaibatch.errors import XaibatchError
from xaibatch.pipeline.host_memory import keep_freed_memory
from xaibatch.pipeline.stopping import Interrupted, interruptible

app = typer.Typer(
    name="xaibatch",
    help="Which explanation of this Vision Transformer can I trust, and is the difference real?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (evaluate, explain, results, train, simulate, listing):
    module.add_to(app)


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script."""
    run_app(app, args)


def run_app(command: typer.Typer, args: list[str] | None = None) -> None:
    """Run a typer application; XaibatchError becomes one line on standard error and its own exit code, SIGINT and
    SIGTERM one line and the shell's, 128 + signal.

    A user's own explainer may lie in the current folder, which a console script does not search by itself.
    """
    keep_freed_memory()
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        with interruptible():
            command(args)
    except (XaibatchError, Interrupted, SystemError) as error:
        told = error.__cause__ if isinstance(error, SystemError) else error  # C++ that was interrupted makes it one
        if not isinstance(told, XaibatchError | Interrupted):
            raise
        print(f"error: {told}", file=sys.stderr)
        raise SystemExit(told.exit_code) from None
