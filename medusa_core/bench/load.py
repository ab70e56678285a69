"""Load from several processes, so that the client is never what is measured: each runs its share in one event loop."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess

from medusa_core.bench.chat_request import PATH, read_answer
from medusa_core.bench.http_stream import Address, Answer, Connection, StreamError
from medusa_core.bench.records import RequestRecord, RunRecord
from medusa_core.errors import EngineError

# Processes start an interpreter each; a machine that takes longer has another problem.
_START_TIMEOUT_S = 120.0
_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Load:
    """One run. bodies: JSON of each request; categories: of each, too.

    concurrency: a closed loop of so many. arrivals_s: an open loop, seconds from the start at which each request is sent.
    Exactly one of the two is set.
    """

    address: Address
    bodies: list[bytes]
    categories: list[str]
    concurrency: int | None = None
    arrivals_s: list[float] | None = None
    api_key: str | None = None
    timeout_s: float = 600.0


def poisson_arrivals_s(num_requests: int, rate: float, seed: int) -> list[float]:
    """Times of arrival at `rate` per second on average; the gaps are exponential, the first request comes at 0."""
    generator = random.Random(seed)
    times, now_s = [], 0.0
    for _ in range(num_requests):
        times.append(now_s)
        now_s += generator.expovariate(rate)
    return times


def run_load(
    load: Load,
    *,
    num_processes: int,
    variant: str,
    repetition: int = 0,
    request_rate: float | None = None,
    on_progress: Callable[[int], object] = lambda num_new: None,
) -> RunRecord:
    """Send every request once and wait for all answers. on_progress: called with the number of requests that have ended since.

    Raises EngineError if a load process dies.
    """
    context = multiprocessing.get_context("spawn")
    num_slots = load.concurrency or len(load.bodies)
    num_processes = min(num_processes, num_slots)
    shared = _Shared(context, num_processes)
    processes: list[tuple[SpawnProcess, Pipe]] = []
    try:
        for rank in range(num_processes):
            receiver, sender = context.Pipe(duplex=False)
            slots = num_slots // num_processes + (rank < num_slots % num_processes)
            process = context.Process(target=_run_share, args=(load, rank, num_processes, slots, shared, sender), daemon=True)
            process.start()
            sender.close()
            processes.append((process, receiver))
        records = _collect(processes, shared, on_progress)
    finally:
        for process, receiver in processes:
            receiver.close()
            process.terminate()
            process.join()
    return RunRecord(
        variant=variant,
        concurrency=load.concurrency,
        repetition=repetition,
        requests=sorted(records, key=lambda record: record.prompt_idx),
        request_rate=request_rate,
    )


class _Shared:
    """Counters and the starting line of all load processes."""

    def __init__(self, context: SpawnContext, num_processes: int) -> None:
        self.next_request = context.Value("q", 0)
        self.num_ended = context.Value("q", 0)
        self.start = context.Barrier(num_processes)

    def take(self) -> int:
        """Number of the next request that nobody has sent. A closed loop shares them this way, so no process runs out early."""
        with self.next_request.get_lock():
            number: int = self.next_request.value
            self.next_request.value += 1
            return number

    def count_end(self) -> None:
        with self.num_ended.get_lock():
            self.num_ended.value += 1


def _collect(
    processes: Sequence[tuple[SpawnProcess, Pipe]], shared: _Shared, on_progress: Callable[[int], object]
) -> list[RequestRecord]:
    waiting = {receiver: process for process, receiver in processes}
    records: list[RequestRecord] = []
    num_seen = 0
    while waiting:
        for ready in wait(list(waiting), timeout=_POLL_S):
            assert isinstance(ready, Pipe)
            process = waiting.pop(ready)
            try:
                records += ready.recv()
            except EOFError:
                process.join()
                raise EngineError(f"A load process died (exit code {process.exitcode}).", hint="Its output says why.") from None
        num_ended = shared.num_ended.value
        on_progress(num_ended - num_seen)
        num_seen = num_ended
    return records


def _run_share(load: Load, rank: int, num_processes: int, num_slots: int, shared: _Shared, sender: Pipe) -> None:
    """Body of a load process."""
    # Ctrl-C reaches every process of the terminal; the one that started us ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    shared.start.wait(_START_TIMEOUT_S)
    sender.send(asyncio.run(_Share(load, shared).run(rank, num_processes, num_slots)))
    sender.close()


class _Share:
    """Requests of one process. Idle connections are kept for the next request. Answers are parsed when all have come, so that
    parsing delays no time stamp."""

    def __init__(self, load: Load, shared: _Shared) -> None:
        self._load = load
        self._shared = shared
        self._idle: list[Connection] = []
        self._records: list[RequestRecord] = []
        self._answers: list[tuple[Answer, RequestRecord]] = []

    async def run(self, rank: int, num_processes: int, num_slots: int) -> list[RequestRecord]:
        if self._load.arrivals_s is None:
            await asyncio.gather(*(self._closed_loop() for _ in range(num_slots)))
        else:
            start_s = time.monotonic()
            mine = range(rank, len(self._load.bodies), num_processes)
            await asyncio.gather(*(self._at(number, start_s + self._load.arrivals_s[number]) for number in mine))
        for connection in self._idle:
            connection.close()
        for answer, record in self._answers:
            try:
                read_answer(answer, record)
            except StreamError as error:
                record.error = str(error)
        return self._records

    async def _closed_loop(self) -> None:
        while (number := self._shared.take()) < len(self._load.bodies):
            await self._send(number)

    async def _at(self, number: int, due_s: float) -> None:
        await asyncio.sleep(max(due_s - time.monotonic(), 0.0))
        await self._send(number)

    async def _send(self, number: int) -> None:
        load = self._load
        request = load.address.request("POST", PATH, load.bodies[number], api_key=load.api_key)
        record = RequestRecord(prompt_idx=number, category=load.categories[number], start_s=time.monotonic())
        self._records.append(record)
        try:
            async with self._connection() as connection, asyncio.timeout(load.timeout_s):
                self._answers.append((await connection.send(request), record))
        except StreamError as error:
            record.error = str(error)
        except TimeoutError:
            record.error = f"No complete answer within {load.timeout_s:g} s."
        record.end_s = time.monotonic()
        self._shared.count_end()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        connection = self._idle.pop() if self._idle else Connection(self._load.address)
        try:
            yield connection
        finally:
            # A failed one has closed itself and connects again when it is used.
            self._idle.append(connection)


async def fetch(address: Address, path: str, *, api_key: str | None = None, timeout_s: float = 30.0) -> bytes:
    """Body of a GET. Raises StreamError, for any status but 200 too."""
    connection = Connection(address)
    try:
        async with asyncio.timeout(timeout_s):
            answer = await connection.send(address.request("GET", path, api_key=api_key))
    except TimeoutError:
        raise StreamError(f"No answer within {timeout_s:g} s.") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise StreamError(f"HTTP {answer.status}")
    return answer.body
