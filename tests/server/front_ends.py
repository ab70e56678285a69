"""A server of several front ends before the fake engine's process, and what tests see of it from outside."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx

from tests.server.test_drain import ROOT, start_streams


class Server:
    """A running server. log: the file that collects its stderr."""

    def __init__(self, log, behaviour, *flags):
        self.log = log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDUSA_")}
        command = [sys.executable, "-m", "tests.server.front_ends_server", behaviour, "--port", "0", *flags]
        with log.open("w") as stderr:
            self.process = subprocess.Popen(command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, stderr=stderr)

    def wait_until_ready(self):
        deadline = time.monotonic() + 60
        while not (match := re.search(r"Listening on (http://\S+)", self.log.read_text())):
            self._check(deadline)
        self.url = httpx.URL(match[1])
        while httpx.get(self.url.join("/ready"), trust_env=False, timeout=60).status_code != 200:
            self._check(deadline)

    def _check(self, deadline):
        assert self.process.poll() is None, self.log.read_text()
        assert time.monotonic() < deadline, self.log.read_text()
        time.sleep(0.05)

    @asynccontextmanager
    async def client(self, **options):
        """Opens a connection for each request: one that is kept would always reach the same process."""
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self.url, limits=limits, timeout=30, trust_env=False, **options) as http:
            yield http

    def children(self, module):
        """Process ids of the main process's children that run a module."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in pids if module in Path(f"/proc/{pid}/cmdline").read_text()]

    @property
    def front_ends(self):
        return self.children("server.front_ends.process")

    @property
    def engine(self):
        (pid,) = self.children("medusa_core.engine.worker")
        return pid

    def num_connections(self, pid):
        """Connections to the server's port that a process holds."""
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        mine = {f"socket:[{line[9]}]" for line in lines if line[1].endswith(f":{self.url.port:04X}") and line[3] == "01"}
        return sum(os.readlink(link) in mine for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())

    async def start_in_both(self, http):
        """Tasks that read streams, of which each front end runs at least one."""
        tasks = []
        while not tasks or not all(self.num_connections(pid) for pid in self.front_ends):
            tasks += await start_streams(http, 4)
        return tasks

    async def exit_code(self):
        async with asyncio.timeout(20):
            while self.process.poll() is None:
                await asyncio.sleep(0.02)
        return self.process.returncode


@contextmanager
def running(folder, behaviour="delay=0.01", *flags):
    """A server that is ready. `flags` may ask for another number of front ends."""
    server = Server(folder / "log", behaviour, "--api-workers", "2", "--served-model-name", "tiny", *flags)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()
