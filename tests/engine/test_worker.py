"""The worker process: dying, restarting, refusing, serving several front ends, and leaving nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio

from medusa_core.engine import supervisor
from medusa_core.engine.loop import FrontEndLostError
from medusa_core.engine.messages import Abort, Command, Event, Failed, Outputs, Query, Rejected, Submit
from medusa_core.engine.peer_client import PeerClient
from medusa_core.engine.supervisor import RestartDelays, WorkerProcess, python_command
from medusa_core.engine.worker import RouterTransport
from medusa_core.engine.worker_client import WorkerClient
from medusa_core.errors import EngineDeadError, EngineError, EngineNotReadyError
from medusa_core.outputs import EngineStats
from tests.engine.fake import INFO, POISON_TOKEN
from tests.engine.harness import FAKE_BUILD, SLOW, collect, make_config, make_request, make_worker_client, tokens_of, until


@pytest.fixture
async def client() -> AsyncIterator[WorkerClient]:
    client = make_worker_client(make_config(SLOW))
    await client.start()
    yield client
    await client.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_killed_worker_ends_live_requests_and_is_replaced(client: WorkerClient):
    readers = [asyncio.create_task(collect(client, make_request(str(i), [5], max_tokens=5000))) for i in range(3)]
    await until(lambda: client.stats.num_running == 3)
    first_pid = client.worker_pid
    os.kill(first_pid, signal.SIGKILL)
    for reader in readers:
        with pytest.raises(EngineDeadError, match="signal 9"):
            await reader
    assert not client.is_ready
    with pytest.raises(EngineNotReadyError):
        await collect(client, make_request("too early", [5], max_tokens=1))
    await until(lambda: client.is_ready)
    assert client.worker_pid != first_pid
    assert tokens_of(await collect(client, make_request("0", [6], max_tokens=2))) == [6, 6]


async def test_a_worker_may_hold_its_pipe_twice(monkeypatch):
    """As under uvloop: the pipe then has no end while the worker lives."""

    def command(module: str) -> tuple[str, ...]:
        *options, bootstrap = python_command(module)[:4]
        return (*options, f"import os; os.dup(1); {bootstrap}", *sys.path)

    monkeypatch.setattr(supervisor, "python_command", command)
    client = make_worker_client(make_config())
    async with asyncio.timeout(60):
        await client.start()
    assert tokens_of(await collect(client, make_request("a", [6], max_tokens=2))) == [6, 6]
    await client.close()


async def test_a_failing_engine_is_replaced_again_and_again(client: WorkerClient):
    for _ in range(2):
        pid = client.worker_pid
        with pytest.raises(EngineError):
            await collect(client, make_request("poison", [POISON_TOKEN], max_tokens=5))
        await until(lambda pid=pid: client.is_ready and client.worker_pid != pid)
    assert tokens_of(await collect(client, make_request("a", [6], max_tokens=2))) == [6, 6]


async def test_a_snapshot_tells_how_often_the_process_was_started(client: WorkerClient):
    assert client.stats.num_starts == 1
    await collect(client, make_request("a", [5], max_tokens=3))
    assert (client.stats.num_starts, client.stats.num_steps_total) == (1, 3)
    os.kill(client.worker_pid, signal.SIGKILL)
    await until(lambda: not client.is_ready)
    await until(lambda: client.is_ready)
    await collect(client, make_request("b", [5], max_tokens=2))
    assert (client.stats.num_starts, client.stats.num_steps_total) == (2, 2)


async def test_the_worker_leaves_ctrl_c_and_sigterm_to_its_parent(client: WorkerClient):
    pid = client.worker_pid
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    assert tokens_of(await collect(client, make_request("a", [6], max_tokens=20))) == [6] * 20
    assert client.worker_pid == pid


async def test_close_ends_the_process_even_amid_a_long_step():
    client = make_worker_client(make_config("delay=60"))
    await client.start()
    reader = asyncio.create_task(collect(client, make_request("a", [5], max_tokens=5)))
    pid = client.worker_pid
    await asyncio.sleep(0.1)
    async with asyncio.timeout(20):
        await client.close()
    assert not is_alive(pid)
    with pytest.raises(EngineDeadError):
        await reader


async def test_close_right_after_start_ends_the_process():
    client = make_worker_client(make_config())
    await client.start()
    pid = client.worker_pid
    await client.close()
    assert not is_alive(pid)


async def test_close_while_restarting_leaves_no_process():
    client = WorkerClient(make_config(), build=FAKE_BUILD, restart_delays_s=(60.0,))
    await client.start()
    os.kill(client.worker_pid, signal.SIGKILL)
    await until(lambda: not client.is_ready)
    async with asyncio.timeout(20):
        await client.close()


@pytest.fixture
async def peer(client: WorkerClient) -> AsyncIterator[PeerClient]:
    """A second client of the worker, which `client` keeps alive."""
    peer = PeerClient()
    peer.learn(client.info)
    peer.connect(client.worker_address, client.stats)
    yield peer
    await peer.close()


async def test_a_client_learns_what_others_run_when_it_asks(client: WorkerClient, peer: PeerClient):
    reader = asyncio.create_task(collect(peer, make_request("a", [5], max_tokens=5000)))
    await until(lambda: peer.stats.num_running == 1)
    assert client.stats.num_running == 0
    await asyncio.gather(client.refresh(), client.refresh())
    assert client.stats.num_running == 1
    await peer.close()
    with pytest.raises(EngineDeadError, match="closed"):
        await reader


async def test_asking_a_dead_engine_ends(client: WorkerClient):
    os.kill(client.worker_pid, signal.SIGSTOP)
    asking = asyncio.create_task(client.refresh())
    await asyncio.sleep(0.05)
    assert not asking.done()
    os.kill(client.worker_pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        await asking
    await client.refresh()
    assert client.stats == EngineStats()


async def test_a_peer_waits_until_the_engine_is_known():
    peer = PeerClient()
    start = asyncio.create_task(peer.start())
    await asyncio.sleep(0)
    assert not start.done()
    with pytest.raises(EngineNotReadyError):
        _ = peer.info
    peer.learn(INFO)
    assert await start == INFO
    assert not peer.is_ready


def test_delays_grow_while_a_process_keeps_dying():
    delays = RestartDelays((0.0, 1.0, 2.0))
    assert [delays.next_s(ran_s=1.0) for _ in range(4)] == [0.0, 1.0, 2.0, 2.0]
    assert [delays.next_s(ran_s=3600.0), delays.next_s(ran_s=1.0)] == [0.0, 1.0]


@pytest.mark.parametrize(("behaviour", "expected"), [("crash", "exit code 3"), ("bug", "exit code 1")])
async def test_a_worker_that_dies_while_loading_is_an_engine_error_with_its_exit_code(behaviour, expected):
    client = make_worker_client(make_config(behaviour))
    with pytest.raises(EngineError, match=expected):
        await client.start()
    assert not client.is_ready
    await client.close()


async def test_a_cancelled_start_leaves_no_process_and_no_folder(private_tmp: Path):
    client = make_worker_client(make_config("slow_load"))
    start = asyncio.create_task(client.start())
    await until(lambda: list(private_tmp.glob("*/engine")) != [])
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert list(private_tmp.iterdir()) == []


@pytest.fixture
def private_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workers put their folders for this test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


async def test_the_socket_is_private_and_removed_at_the_end(private_tmp: Path):
    client = make_worker_client(make_config())
    await client.start()
    (folder,) = private_tmp.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "engine").is_socket()
    os.kill(client.worker_pid, signal.SIGKILL)
    await until(lambda: not folder.exists() and client.is_ready)
    await client.close()
    assert list(private_tmp.iterdir()) == []


async def test_the_worker_dies_with_its_parent_and_removes_its_folder(tmp_path: Path):
    """The parent is a process of its own, killed without a chance to clean up."""
    script = (
        "import asyncio, tempfile\n"
        "from tests.engine.harness import make_config, make_worker_client\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "async def main():\n"
        "    client = make_worker_client(make_config())\n"
        "    await client.start()\n"
        "    print(client.worker_pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        worker_pid = int(parent.stdout.readline())
        assert is_alive(worker_pid)
        parent.kill()
    await until(lambda: list(tmp_path.iterdir()) == [] and not is_running(worker_pid))


def is_running(pid: int) -> bool:
    """As is_alive, but a zombie that nobody reaps (its parent is gone) counts as ended."""
    status = Path(f"/proc/{pid}/stat")
    return is_alive(pid) and not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_front_end_never_loads_torch():
    code = "import sys, medusa_core.engine.worker_client, medusa_core.engine.in_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class FrontEnd:
    """A bare DEALER peer."""

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.connect(address)

    async def send(self, command: Command) -> None:
        await self.socket.send(msgspec.msgpack.encode(command))

    async def receive(self) -> Event:
        async with asyncio.timeout(20):
            return msgspec.msgpack.decode(await self.socket.recv(), type=Event)

    async def tokens(self, num_tokens: int) -> list[int]:
        token_ids: list[int] = []
        while len(token_ids) < num_tokens:
            event = await self.receive()
            assert isinstance(event, Outputs)
            assert {delta.request_id for delta in event.deltas} <= {"same id"}
            token_ids += [token_id for delta in event.deltas for token_id in delta.token_ids]
        return token_ids


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[], FrontEnd]]:
    """connect() -> a further front end of one slow fake worker."""
    worker = await WorkerProcess.spawn(make_config(SLOW), build=FAKE_BUILD, log_level="INFO")
    await worker.ready()
    context = zmq.asyncio.Context()
    yield lambda: FrontEnd(context, worker.address)
    context.destroy(linger=0)
    await worker.stop()


async def test_two_front_ends_may_use_the_same_request_id(connect: Callable[[], FrontEnd]):
    one, other = connect(), connect()
    await one.send(Submit(make_request("same id", [5], max_tokens=8)))
    await other.send(Submit(make_request("same id", [6], max_tokens=8)))
    assert await asyncio.gather(one.tokens(8), other.tokens(8)) == [[5] * 8, [6] * 8]


async def test_an_abort_reaches_only_the_requests_of_its_front_end(connect: Callable[[], FrontEnd]):
    one, other = connect(), connect()
    await one.send(Submit(make_request("same id", [5], max_tokens=5000)))
    await other.send(Submit(make_request("same id", [6], max_tokens=20)))
    await one.tokens(1)
    await one.send(Abort("same id"))
    assert await other.tokens(20) == [6] * 20


async def test_a_second_request_with_a_live_id_is_rejected_by_the_engine_too(connect: Callable[[], FrontEnd]):
    front_end = connect()
    await front_end.send(Submit(make_request("same id", [5], max_tokens=5)))
    await front_end.send(Submit(make_request("same id", [6], max_tokens=5)))
    events = [await front_end.receive() for _ in range(3)]
    assert [event.error.param for event in events if isinstance(event, Rejected)] == ["request_id"]


async def test_a_front_end_that_disappears_frees_its_requests(connect: Callable[[], FrontEnd]):
    leaving, staying = connect(), connect()
    await leaving.send(Submit(make_request("same id", [5], max_tokens=5000, n=3)))
    await leaving.tokens(1)
    await staying.send(Submit(make_request("same id", [6], max_tokens=2000)))
    await staying.tokens(1)
    leaving.socket.close(linger=0)
    async with asyncio.timeout(20):
        while True:
            event = await staying.receive()
            if event.stats.num_running == 1:
                break
    assert await staying.tokens(5) == [6] * 5


async def test_the_last_front_end_frees_its_requests_too_when_it_disappears(connect: Callable[[], FrontEnd]):
    """Nobody else has requests, so nobody else would be told of a step."""
    asking, leaving = connect(), connect()
    await leaving.send(Submit(make_request("same id", [5], max_tokens=5000, n=3)))
    await leaving.tokens(1)
    leaving.socket.close(linger=0)
    async with asyncio.timeout(20):
        num_running = 3
        while num_running:
            await asking.send(Query())
            num_running = (await asking.receive()).stats.num_running


async def test_a_front_end_without_requests_is_told_of_no_steps_but_may_ask(connect: Callable[[], FrontEnd]):
    idle, busy = connect(), connect()
    await idle.send(Submit(make_request("same id", [5], max_tokens=1)))
    await idle.tokens(1)
    await busy.send(Submit(make_request("same id", [6], max_tokens=20)))
    assert await busy.tokens(20) == [6] * 20
    await idle.send(Query())
    event = await idle.receive()
    assert isinstance(event, Outputs)
    assert event.stats.num_steps_total == 21


async def test_a_message_that_cannot_be_read_disturbs_nobody(connect: Callable[[], FrontEnd]):
    front_end = connect()
    await front_end.socket.send(b"\xc1 nonsense")
    await front_end.send(Submit(make_request("same id", [5], max_tokens=3)))
    assert await front_end.tokens(3) == [5] * 3


@pytest.fixture
def stalled() -> Iterator[tuple[RouterTransport, zmq.Socket[bytes], bytes]]:
    """A router with room for few messages, and a peer known to it that does not read yet."""
    with RouterTransport("inproc://stalled", max_unsent=4) as router:
        peer = router._context.socket(zmq.DEALER)
        peer.setsockopt(zmq.RCVHWM, 4)
        peer.connect("inproc://stalled")
        peer.send(msgspec.msgpack.encode(Abort("a")))
        ((identity, _),) = router.receive(is_blocking=True)
        yield router, peer, identity


def fill(router: RouterTransport, identity: bytes) -> None:
    for _ in range(100):
        router.send(identity, Outputs([], EngineStats()))


def test_a_front_end_that_stops_reading_is_given_up_without_blocking(stalled):
    router, _, identity = stalled
    with pytest.raises(FrontEndLostError, match="stopped reading"):
        fill(router, identity)


def test_a_front_end_that_reads_again_learns_that_its_requests_have_ended(stalled):
    router, peer, identity = stalled
    with pytest.raises(FrontEndLostError):
        fill(router, identity)
    router.receive(is_blocking=True)  # still no room; an idle engine wakes by itself to try again
    events: list[Event] = []
    while peer.poll(0):
        events.append(msgspec.msgpack.decode(peer.recv(), type=Event))
    assert not any(isinstance(event, Failed) for event in events)
    router.receive(is_blocking=False)
    assert isinstance(msgspec.msgpack.decode(peer.recv(), type=Event), Failed)
