"""Logs of the server's and the engine's process in one form: lines for people, or JSON for machines."""

from __future__ import annotations

import io
import logging
import sys
import threading
from types import TracebackType
from typing import Literal, TypeAlias

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

LogFormat: TypeAlias = Literal["text", "json"]

logger = logging.getLogger(__name__)

# Libraries that bring a handler of their own, which would write in another form.
_LIBRARIES = ("transformers", "huggingface_hub")
# Whatever else than text is in a message cannot move the cursor, colour the terminal or look like a line of its own.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (ord("\t"), ord("\n"))}
_ESCAPES |= {0x2028: "\\u2028", 0x2029: "\\u2029"}


class TextFormatter(logging.Formatter):
    """A line begins with a time. Further lines of one event, such as a traceback's, are indented: nothing that a client sends
    passes for an event of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).translate(_ESCAPES).replace("\n", "\n    ")


def json_formatter() -> logging.Formatter:
    """One JSON object a line. An event that is a dict has its keys beside time, level, logger and process id; any other has
    `message`, and `exc_info` where there is a traceback."""
    return JsonFormatter(
        ["levelname", "name", "process", "message"],
        timestamp="time",
        rename_fields={"levelname": "level", "name": "logger"},
        # uvicorn's second wording of its messages
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],
    )


def configure_logging(level: str, log_format: LogFormat) -> None:
    """Everything this process logs goes to stderr; as JSON, so do warnings, prints, and what ends a thread or the process."""
    handler = logging.StreamHandler()
    handler.setFormatter(json_formatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    if log_format == "json":
        logging.captureWarnings(True)
        sys.stdout = _Printed()
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread


def adopt_library_logs() -> None:
    """What libraries log goes the way of everything else. To be called when they are imported, which is when they choose theirs."""
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True


class _Printed(io.TextIOBase):
    """Standard output of a process in which libraries may print: its lines are logged, each when it has ended."""

    def __init__(self) -> None:
        super().__init__()
        self._unfinished = ""

    def write(self, text: str) -> int:
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            self._log(line)
        return len(text)

    def flush(self) -> None:
        line, self._unfinished = self._unfinished, ""
        self._log(line)

    def _log(self, line: str) -> None:
        if line.strip():
            logger.info("%s", line)


def _log_uncaught(error_class: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logger.critical("uncaught error", exc_info=(error_class, error, traceback))


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if isinstance(arguments.exc_value, BaseException):
        _log_uncaught(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
