"""Files of JSON lines, which people write by hand: every error names file and line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from medusa_core.errors import ConfigError


def read_json_lines(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line that is not empty; `where` begins messages about the line, `name` those about the file.

    Raises ConfigError for a file that cannot be read and a line that is no JSON.
    """
    try:
        # Lines end with newlines alone: JSON texts may hold other characters that end lines. A byte order mark is no part of it.
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}, line {number}"
                if line.strip():
                    yield where, _decode(line, where)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8: {error}.") from error


def _decode(line: str, where: str) -> Any:
    try:
        return msgspec.json.decode(line.encode())
    except msgspec.DecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error}).") from error
