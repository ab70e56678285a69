"""Entry point of `medusa`: subcommands, and how errors end the program."""

from __future__ import annotations

import sys

import typer

from medusa_core import __version__
from medusa_core.cli.generate import generate
from medusa_core.errors import MedusaError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run language models with Medusa heads.")
app.command()(generate)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Exit code 2 and one sentence for anything the user can mend."""
    try:
        app()
    except MedusaError as error:
        print(f"medusa: {error}", file=sys.stderr)
        sys.exit(2)
