"""What every subcommand does first."""

from __future__ import annotations

import logging
import sys

from medusa_core.bench.plots import require_matplotlib


def start_command(*, verbose: bool, has_plots: bool = False) -> bool:
    """Set up logging, and make sure that plots can be drawn (ConfigError if not). Returns whether to draw progress bars."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if has_plots:
        require_matplotlib()
    return sys.stderr.isatty()
