"""The worker process: an engine core behind a ZeroMQ ROUTER socket, started and ended by supervisor.WorkerProcess.

Its stdin and stdout are pipes to the parent. The parent writes a WorkerSpec line and keeps the pipe open: end of file means that
the worker is no longer wanted, or that the parent is dead. Back comes one Ready or StartFailed. Everything else goes to stderr.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import importlib
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO, NoReturn, cast

import msgspec
import zmq

from medusa_core.engine.core import EngineCore
from medusa_core.engine.logs import adopt_library_logs, configure_logging
from medusa_core.engine.loop import EngineLoop, FrontEndLostError
from medusa_core.engine.messages import (
    LENGTH_BYTES,
    Command,
    Event,
    Failed,
    Ready,
    StartFailed,
    StartOutcome,
    WireError,
    WorkerSpec,
    engine_failure,
)
from medusa_core.errors import MedusaError

logger = logging.getLogger(__name__)

# Messages that may wait for one front end, i.e. steps it may fall behind, before it counts as lost.
MAX_UNSENT_MESSAGES = 10_000
# How often an idle engine tries to tell a stalled front end that its requests have ended.
_STALLED_RETRY_MS = 200
# How long the last messages may take to leave when the loop has ended.
_LINGER_MS = 1_000
# New objects alive before the garbage collector looks at them.
_GC_THRESHOLD = 50_000
# How long the thread that makes masks waits for the interpreter while a step is planned, which takes up to a millisecond.
SWITCH_INTERVAL_S = 1e-4


class RouterTransport:
    """Front ends are DEALER peers; ZeroMQ names each connection, so a peer that reconnects is a new front end."""

    is_closed = False

    def __init__(self, address: str, *, max_unsent: int = MAX_UNSENT_MESSAGES) -> None:
        self._context = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a peer that is gone is an error, not silence
        self._router.setsockopt(zmq.SNDHWM, max_unsent)
        self._router.setsockopt(zmq.RCVHWM, 0)  # the engine's queue limit is the one that answers
        self._router.bind(address)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
        self._stalled: set[bytes] = set()

    def __enter__(self) -> RouterTransport:
        return self

    def __exit__(
        self, error_class: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._context.destroy(linger=_LINGER_MS)

    def receive(self, *, is_blocking: bool) -> list[tuple[bytes, Command]]:
        self._notify_stalled()
        if is_blocking:
            self._router.poll(_STALLED_RETRY_MS if self._stalled else None)
        commands: list[tuple[bytes, Command]] = []
        while True:
            try:
                front_end, payload = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return commands
            try:
                commands.append((front_end, self._decoder.decode(payload)))
            except (msgspec.DecodeError, MedusaError):
                logger.exception("front end %s sent a message that cannot be read; ignoring it", front_end.hex())

    def send(self, front_end: bytes, event: Event) -> None:
        try:
            self._router.send_multipart((front_end, self._encode(event)), zmq.NOBLOCK)
        except zmq.Again as error:
            self._stalled.add(front_end)
            raise FrontEndLostError("has stopped reading") from error
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            raise FrontEndLostError("is gone") from error

    def _notify_stalled(self) -> None:
        """A stalled front end that reads again must learn that its requests have ended."""
        for front_end in list(self._stalled):
            self._stalled.discard(front_end)
            try:
                self.send(front_end, Failed(WireError.of(engine_failure())))
            except FrontEndLostError:
                continue  # still stalled (and back in the set), or gone for good


def main() -> NoReturn:
    """Entry point of the process."""
    # Ctrl-C and a service manager's SIGTERM reach the whole process group; the parent drains first and then ends the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    spec_pipe, outcome_pipe = _take_pipes()
    spec = msgspec.json.decode(spec_pipe.readline(), type=WorkerSpec)
    threading.Thread(target=_exit_with_parent, args=(spec_pipe, spec.folder), name="parent-watch", daemon=True).start()
    configure_logging(spec.log_level, spec.log_format)
    exit_code = 1
    try:
        exit_code = _serve(spec, outcome_pipe)
    except Exception:
        logger.exception("the engine process failed")
    logging.shutdown()
    # Not sys.exit: a device in a bad state can hang the interpreter's clean-up, and the parent waits for this process to end.
    os._exit(exit_code)


def _serve(spec: WorkerSpec, outcome_pipe: BinaryIO) -> int:
    """Load, report, run. Returns the exit code."""
    with RouterTransport(spec.address) as transport:
        try:
            build = _import_build(spec.build)
            adopt_library_logs()
            # Progress bars are for people.
            core = build(spec.config, progress=spec.log_format == "text")
        except MedusaError as error:
            logger.error("the engine did not start: %s", error)
            _report(outcome_pipe, StartFailed(WireError.of(error)))
            return 1
        core.num_starts = spec.num_starts
        _tame_garbage_collector()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        _report(outcome_pipe, Ready(core.info, core.stats()))
        return 0 if EngineLoop(core, transport).run() else 1


def _tame_garbage_collector() -> None:
    """A full collection walks every object of torch and transformers, some hundred ms during which no step is launched.

    What exists now lives as long as the process, so it is never looked at again. Steps make no reference cycles: their objects go
    when the last reference goes, and the collector, which counts what is alive, need not run for each thousand tokens kept.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)


def _report(outcome_pipe: BinaryIO, outcome: StartOutcome) -> None:
    payload = msgspec.msgpack.encode(outcome)
    outcome_pipe.write(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)
    outcome_pipe.close()


def _import_build(path: str) -> Callable[..., EngineCore]:
    module_name, _, function_name = path.partition(":")
    return cast("Callable[..., EngineCore]", getattr(importlib.import_module(module_name), function_name))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the parent's pipes to ourselves: libraries that read stdin meet its end, and their prints join stderr."""
    spec_pipe, outcome_pipe = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)
    return spec_pipe, outcome_pipe


def _exit_with_parent(spec_pipe: BinaryIO, folder: str) -> None:
    """Ends the process when the parent closes the pipe or dies, also while a model loads or a step hangs."""
    spec_pipe.read()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)
