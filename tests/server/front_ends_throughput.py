"""HTTP throughput against the number of front ends, with the fake engine: what HTTP costs where the engine costs next to nothing.

    python -m tests.server.front_ends_throughput --api-workers 1 2 4 --clients 64 --rounds 3

Prints one table per kind of request. The numbers of front ends take turns in each round, so that a machine's moods spread over all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from medusa_core.bench.http_stream import Address
from tests.server.front_ends import running

# Tokens per answer, and whether it is streamed. The first measures requests, the second frames.
KINDS = {"requests": {"max_tokens": 1}, "streams": {"max_tokens": 256, "stream": True}}
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


async def converse(address, body, end_s):
    """Requests answered and frames received over one connection until `end_s`, the last answer included."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    request = address.request("POST", "/v1/completions", json.dumps({"model": "tiny", "prompt": "Hi", **body}).encode())
    num_requests = num_frames = 0
    while time.monotonic() < end_s:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        if body.get("stream"):
            tail = b""
            while not tail.endswith(b"0\r\n\r\n"):
                piece = await reader.read(2**16)
                num_frames += piece.count(b"data: {")
                tail = (tail + piece)[-16:]
        else:
            num_bytes = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(num_bytes)
        num_requests += 1
    writer.close()
    return num_requests, num_frames


def load(url, body, num_clients, end_s, results):
    async def run():
        address = Address.parse(url)
        return await asyncio.gather(*(converse(address, body, end_s) for _ in range(num_clients)))

    results.put([sum(counts) for counts in zip(*asyncio.run(run()), strict=True)])


def cpu_s(pids):
    """Seconds of processor time that processes have used so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks * TICK_S


def measure(num_front_ends, kind, options):
    """Requests, tokens and frames per second; microseconds of front ends' and engine's processor time per request or frame.

    A front end that is behind puts several tokens in a frame.
    """
    flags = ("--api-workers", str(num_front_ends), "--no-access-log", "--max-queued-requests", "4096")
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), f"delay={options.step_ms / 1e3}", *flags) as server:
        front_ends = server.front_ends if num_front_ends > 1 else [server.process.pid]
        results = multiprocessing.Queue()
        start_s = time.monotonic()
        end_s = start_s + options.seconds
        before = cpu_s(front_ends), cpu_s([server.engine])
        shares = [options.clients // options.load_processes] * options.load_processes
        arguments = [(str(server.url), KINDS[kind], share, end_s, results) for share in shares]
        processes = [multiprocessing.Process(target=load, args=each) for each in arguments]
        for process in processes:
            process.start()
        counts = [results.get() for _ in processes]
        elapsed_s = time.monotonic() - start_s
        after = cpu_s(front_ends), cpu_s([server.engine])
        num_requests, num_frames = (sum(values) for values in zip(*counts, strict=True))
        unit = num_frames or num_requests
        front_end_us, engine_us = ((new - old) * 1e6 / unit for old, new in zip(before, after, strict=True))
        tokens_per_s = num_requests * KINDS[kind]["max_tokens"] / elapsed_s
        return num_requests / elapsed_s, tokens_per_s, num_frames / elapsed_s, front_end_us, engine_us


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api-workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clients", type=int, default=64, help="connections, each with one request at a time")
    parser.add_argument("--load-processes", type=int, default=2, help="processes that share the clients")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--step-ms", type=float, default=1.0, help="time of the fake engine's step, which gives each stream a token"
    )
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {options}\n")
    for kind in KINDS:
        rows = defaultdict(list)
        for _ in range(options.rounds):
            for num_front_ends in options.api_workers:
                rows[num_front_ends].append(measure(num_front_ends, kind, options))
                print(kind, num_front_ends, rows[num_front_ends][-1], f"load {os.getloadavg()[0]:.1f}", file=sys.stderr)
        print(f"| {kind}: front ends | requests/s | tokens/s | frames/s | front ends' CPU, us each | engine's CPU, us each |")
        print("| --- " * 6 + "|")
        for num_front_ends, results in rows.items():
            cells = [f"{statistics.median(v):,.0f} ({min(v):,.0f} to {max(v):,.0f})" for v in zip(*results, strict=True)]
            print(f"| {num_front_ends} | {' | '.join(cells)} |")
        print()


if __name__ == "__main__":
    main()
