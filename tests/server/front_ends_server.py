"""A server before the fake engine's process, of as many front ends as asked for. Arguments: the engine's behaviour, then flags."""

from __future__ import annotations

import sys

from medusa_core.engine.worker_client import WorkerClient
from medusa_core.errors import MedusaError
from server.main import EXIT_USAGE, print_error, serve, serve_with_front_ends
from server.settings import load_settings
from tests.engine.harness import FAKE_BUILD, make_config
from tests.server.fakes import text_loader


def main() -> int:
    behaviour, *flags = sys.argv[1:]
    settings = load_settings(flags)
    config = make_config(behaviour, max_queued_requests=settings.max_queued_requests)
    try:
        if settings.api_workers == 1:
            return serve(WorkerClient(config, build=FAKE_BUILD), text_loader(settings), settings)
        return serve_with_front_ends(config, settings, build=FAKE_BUILD, load_text="tests.server.fakes:text_loader")
    except MedusaError as error:
        print_error(error, settings)
        return EXIT_USAGE


if __name__ == "__main__":
    raise SystemExit(main())
