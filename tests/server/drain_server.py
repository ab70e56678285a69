"""A server process over the fake engine, for tests of signals. Arguments: seconds per step, then flags."""

from __future__ import annotations

import sys

from medusa_core.errors import MedusaError, ModelLoadError
from server.main import EXIT_USAGE, print_error, serve
from server.settings import load_settings
from tests.server.fakes import FakeClient, FakeText


def main() -> int:
    step_s, *flags = sys.argv[1:]
    settings = load_settings(flags)
    load_error = ModelLoadError("The model's file is truncated.") if settings.model == "broken" else None
    client = FakeClient(answer=lambda *_: "x" * 60, step_s=float(step_s), load_error=load_error)
    try:
        return serve(client, lambda info: FakeText(), settings)
    except MedusaError as error:
        print_error(error, settings)
        return EXIT_USAGE


if __name__ == "__main__":
    raise SystemExit(main())
