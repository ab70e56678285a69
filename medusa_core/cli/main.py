"""Entry point of `medusa`: subcommands, and how errors end the program."""

from __future__ import annotations

import os
import sys

import typer

from medusa_core import __version__
from medusa_core.engine.environment import ENGINE_ENVIRONMENT
from medusa_core.errors import MedusaError


def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def make_app() -> typer.Typer:
    # Here and not above: it imports torch, which reads the environment once.
    from medusa_core.cli.bench import bench_app
    from medusa_core.cli.calibrate import calibrate_heads
    from medusa_core.cli.generate import generate
    from medusa_core.cli.train import train

    app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run language models with Medusa heads.")
    app.callback(invoke_without_command=True)(root)
    app.command()(generate)
    app.command()(train)
    app.command("calibrate")(calibrate_heads)
    app.add_typer(bench_app, name="bench")
    return app


def main() -> None:
    """Exit code 2 and one sentence for anything the user can mend."""
    for name, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        make_app()()
    except MedusaError as error:
        print(f"medusa: {error}", file=sys.stderr)
        sys.exit(2)
