"""A small HTTP/1.1 client for streams of server-sent events. A general client costs more CPU per frame than the server it measures.

Knows what a server's answer to one POST needs: status, headers, bodies by chunks, by length, or up to the end of the connection.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from medusa_core.errors import ConfigError

_READ_BYTES = 2**16


class StreamError(Exception):
    """A request that failed; the message is counted, so it names no request."""


@dataclass(frozen=True, slots=True)
class Address:
    """Of a server: "http://host:port/prefix", where a path like /v1 or none at all comes last."""

    host: str
    port: int
    prefix: str = ""
    is_tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises ConfigError. A trailing /v1 is dropped: SDKs want it in their base URL, and we add it to every path."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--url {url!r}: {error}.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url must be like http://localhost:8000, got {url!r}.")
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError("--url must be host, port and path only.", hint="A key is given by --api-key.")
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if is_tls else 80), prefix, is_tls)

    def request(self, method: str, path: str, body: bytes = b"", *, api_key: str | None = None) -> bytes:
        """A whole request as bytes."""
        lines = [
            f"{method} {self.prefix}{path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Accept: text/event-stream, application/json",
            *([f"Authorization: Bearer {api_key}"] if api_key else []),
            *(["Content-Type: application/json"] if body else []),
            f"Content-Length: {len(body)}",
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class EventParser:
    """Server-sent events out of a body that arrives in any pieces: the `data` of each, comments and other fields left out."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Data of the events that this piece completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


@dataclass(slots=True)
class Answer:
    """events: arrival and data of each event, in order. body: of an answer that is no event stream."""

    status: int
    events: list[tuple[float, bytes]] = field(default_factory=list)
    body: bytes = b""


class Connection:
    """One connection at a time to a server, kept open between requests where the server allows it. Not for concurrent use."""

    def __init__(self, address: Address, clock: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._clock = clock
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: bytes) -> Answer:
        """Send a request and read the whole answer. Raises StreamError if the connection fails or the answer is cut short."""
        is_reused = self._streams is not None
        try:
            reader = await self._write(request)
            head = await self._read_head(reader)
            if head is None and is_reused:
                # The server closed an idle connection just as we used it, so it never saw the request: ask again.
                self.close()
                reader = await self._write(request)
                head = await self._read_head(reader)
            if head is None:
                raise StreamError("The server closed the connection without an answer.")
            return await self._read_answer(reader, *head)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            self.close()
            raise StreamError(_describe(error)) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _write(self, request: bytes) -> asyncio.StreamReader:
        if self._streams is None:
            context = ssl.create_default_context() if self._address.is_tls else None
            self._streams = await asyncio.open_connection(self._address.host, self._address.port, ssl=context)
        reader, writer = self._streams
        writer.write(request)
        await writer.drain()
        return reader

    async def _read_head(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str]] | None:
        """Status and headers, names in lower case; None where the connection ended before a byte."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (ConnectionResetError, BrokenPipeError):
            return None
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                return None
            raise
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        return int(status_line.split()[1]), headers

    async def _read_answer(self, reader: asyncio.StreamReader, status: int, headers: dict[str, str]) -> Answer:
        answer = Answer(status)
        if headers.get("content-type", "").startswith("text/event-stream"):
            parser = EventParser()
            async for piece in _body(reader, headers):
                now_s = self._clock()
                answer.events += [(now_s, data) for data in parser.feed(piece)]
        else:
            answer.body = b"".join([piece async for piece in _body(reader, headers)])
        if headers.get("connection", "").lower() == "close" or not _has_end(headers):
            self.close()
        return answer


def _has_end(headers: dict[str, str]) -> bool:
    """Whether the body ends before the connection does."""
    return "chunked" in headers.get("transfer-encoding", "").lower() or "content-length" in headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body, in pieces as they arrive. Raises IncompleteReadError where it is cut short."""
    if "chunked" in headers.get("transfer-encoding", "").lower():
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        while await reader.readuntil(b"\r\n") != b"\r\n":  # trailers
            pass
    elif "content-length" in headers:
        num_left = int(headers["content-length"])
        while num_left:
            piece = await reader.read(min(num_left, _READ_BYTES))
            if not piece:
                raise asyncio.IncompleteReadError(b"", num_left)
            num_left -= len(piece)
            yield piece
    else:
        while piece := await reader.read(_READ_BYTES):
            yield piece


def _describe(error: Exception) -> str:
    if isinstance(error, asyncio.IncompleteReadError):
        return "The answer was cut short."
    if isinstance(error, ConnectionRefusedError):
        return "The connection was refused."
    if isinstance(error, OSError):
        return f"The connection failed: {error.strerror or type(error).__name__}."
    return f"The answer is not HTTP: {error}."
