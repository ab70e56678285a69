"""Signals to a server process: running streams end, new requests are refused, the exit code tells what happened."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
BODY = {"model": "tiny", "prompt": "Hi", "max_tokens": 61}


@asynccontextmanager
async def server_process(*arguments):
    """(process, base URL) of tests/server/drain_server.py."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.server.drain_server", *arguments, "--port", "0"]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stderr=asyncio.subprocess.PIPE)
    try:
        url = None
        while url is None and (line := (await process.stderr.readline()).decode()):
            match = re.search(r"Listening on (http://\S+)", line)
            url = match and match[1]
        yield process, url
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until_ready(http):
    while True:
        try:
            if (await http.get("/ready")).status_code == 200:
                return
        except httpx.ConnectError:
            pass
        await asyncio.sleep(0.05)


async def start_streams(http, count):
    """Tasks that read whole streams, once all of them run."""

    async def read():
        async with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
            lines = response.aiter_lines()
            await anext(lines)
            running.release()
            return [line async for line in lines if line]

    running = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(read()) for _ in range(count)]
    for _ in tasks:
        await running.acquire()
    return tasks


async def test_sigterm_drains_running_streams_and_exits_with_0():
    async with server_process("0.1") as (process, url), asyncio.timeout(20), httpx.AsyncClient(base_url=url) as http:
        await until_ready(http)
        tasks = await start_streams(http, 5)
        process.send_signal(signal.SIGTERM)
        while (await http.get("/ready")).status_code == 200:
            await asyncio.sleep(0.01)
        refused = await http.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
        for lines in await asyncio.gather(*tasks):
            assert lines[-1] == "data: [DONE]"
            assert '"finish_reason":"stop"' in lines[-2]
        assert await process.wait() == 0


def send_body_late(url, gap_s):
    """The whole answer to a request whose body follows its header after a gap."""
    body = json.dumps(BODY).encode()
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
        time.sleep(gap_s)
        connection.sendall(body)
        return b"".join(iter(lambda: connection.recv(65536), b""))


async def test_a_refusal_reaches_a_client_whose_body_is_still_under_way():
    """Answering and closing before the body has come would reset the connection, and the answer with it."""
    async with server_process("0.1") as (process, url), asyncio.timeout(20), httpx.AsyncClient(base_url=url) as http:
        await until_ready(http)
        tasks = await start_streams(http, 1)
        process.send_signal(signal.SIGTERM)
        while (await http.get("/ready")).status_code == 200:
            await asyncio.sleep(0.01)
        # Some of these bodies arrive between the server's answer and its close, which is when a reset takes the answer away.
        for step in range(100):
            answer = await asyncio.to_thread(send_body_late, httpx.URL(url), step * 4e-5)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"server_draining" in answer
        await asyncio.gather(*tasks)


async def test_an_idle_server_exits_at_once_with_0():
    async with server_process("0.1") as (process, url), asyncio.timeout(20), httpx.AsyncClient(base_url=url) as http:
        await until_ready(http)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0


async def test_the_drain_gives_up_after_its_timeout():
    async with (
        server_process("30", "--drain-timeout-s", "0.2") as (process, url),
        asyncio.timeout(20),
        httpx.AsyncClient(base_url=url) as http,
    ):
        await until_ready(http)
        task = asyncio.create_task(http.post("/v1/completions", json=BODY, timeout=20))
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        await asyncio.gather(task, return_exceptions=True)


async def test_a_second_signal_exits_at_once():
    async with server_process("30") as (process, url), asyncio.timeout(20), httpx.AsyncClient(base_url=url) as http:
        await until_ready(http)
        task = asyncio.create_task(http.post("/v1/completions", json=BODY, timeout=20))
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        while (await http.get("/ready")).status_code == 200:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 1
        await asyncio.gather(task, return_exceptions=True)


async def test_a_failed_first_load_is_one_sentence_and_code_2():
    async with server_process("0", "--model", "broken") as (process, _), asyncio.timeout(20):
        stderr = (await process.stderr.read()).decode()
        assert await process.wait() == 2
        assert "medusa-server: The model's file is truncated." in stderr
        assert "Traceback" not in stderr
