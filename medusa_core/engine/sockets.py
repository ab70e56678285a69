"""ZeroMQ sockets on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
import zmq


def open_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket without limits: what can pile up is bounded by the live requests, and neither side may ever wait for the other."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    return socket


class SocketReader:
    """Calls `take` for each message of a socket. zmq.asyncio would do, at four times the work per message.

    take: receives one message without blocking, so that zmq.Again says that there is none. on_failure: called with what else it
    raises, after which nothing is read any more.
    """

    def __init__(self, socket: zmq.Socket[bytes], take: Callable[[], None], on_failure: Callable[[BaseException], None]) -> None:
        self._socket = socket
        self._take = take
        self._on_failure = on_failure
        self._may_have_messages = asyncio.Event()
        self._event_loop = asyncio.get_running_loop()
        self._event_loop.add_reader(socket.FD, self.wake)
        self._task = asyncio.create_task(self._read(), name="medusa-receiver")
        self._task.add_done_callback(self._on_end)

    def wake(self) -> None:
        """Look for messages. To be called after sending too: the descriptor tells of a message once, which sending may swallow."""
        self._may_have_messages.set()

    def close(self) -> None:
        self._event_loop.remove_reader(self._socket.FD)
        self._task.cancel()

    async def _read(self) -> None:
        self.wake()
        while True:
            await self._may_have_messages.wait()
            self._may_have_messages.clear()
            # All there is, before anybody else runs: a reader that is behind then finds several messages at once.
            with contextlib.suppress(zmq.Again):
                while True:
                    self._take()

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)


class Dealer:
    """One end of a line to a ROUTER socket, with messages as msgpack.

    message_type: what the other end sends. on_message: called with each. on_failure: as SocketReader's. name: under which the
    ROUTER knows this end, unique among those connected; without, it makes one up.
    """

    def __init__(
        self,
        address: str,
        message_type: Any,
        *,
        on_message: Callable[[Any], None],
        on_failure: Callable[[BaseException], None],
        name: str | None = None,
    ) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = open_socket(self._context, zmq.DEALER)
        if name is not None:
            self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.connect(address)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(message_type).decode
        self._on_message = on_message
        self._reader = SocketReader(self._socket, self._take, on_failure)

    def send(self, message: Any) -> None:
        self._socket.send(self._encode(message))  # without a limit it is queued at once; there is nothing to wait for
        self._reader.wake()

    def close(self, *, linger_ms: int = 0) -> None:
        """linger_ms: how long messages may still take to leave."""
        self._reader.close()
        self._context.destroy(linger=linger_ms)

    def _take(self) -> None:
        self._on_message(self._decode(self._socket.recv(zmq.NOBLOCK)))


class Router:
    """The end where any number of Dealer lines meet, with messages as msgpack. What is sent to one that has gone is dropped.

    message_type: what the others send. on_message: called with the sender's name and each. on_failure: as SocketReader's.
    """

    def __init__(
        self,
        address: str,
        message_type: Any,
        *,
        on_message: Callable[[str, Any], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = open_socket(self._context, zmq.ROUTER)
        self._socket.bind(address)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(message_type).decode
        self._on_message = on_message
        self._reader = SocketReader(self._socket, self._take, on_failure)

    def send(self, name: str, message: Any) -> None:
        self._socket.send_multipart((name.encode(), self._encode(message)))
        self._reader.wake()

    def close(self) -> None:
        self._reader.close()
        self._context.destroy(linger=0)

    def _take(self) -> None:
        name, payload = self._socket.recv_multipart(zmq.NOBLOCK)
        self._on_message(name.decode(), self._decode(payload))
