"""A Prometheus with the project's own configuration, which scrapes a server of a test."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import httpx
import yaml

from deploy.grafana.panel_data import Prometheus
from tests.e2e.server_process import ROOT, until

CONFIG = ROOT / "deploy/prometheus/prometheus.yml"


class PrometheusProcess:
    """A running Prometheus. Everything is as in deploy/prometheus but the target.

    target: host and port. folder: for its data and log.
    """

    def __init__(self, target: str, folder: Path) -> None:
        shutil.copytree(CONFIG.parent, folder / "config")
        config = yaml.safe_load(CONFIG.read_text())
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": [target]}]
        self.job: str = job["job_name"]
        (folder / "config" / CONFIG.name).write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{_free_port()}"
        command = [
            "prometheus",
            f"--config.file={folder / 'config' / CONFIG.name}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ]
        self.log = folder / "prometheus.log"
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr, stdout=stderr)
        self.url = f"http://{address}"
        try:
            until(self._is_ready)
        except BaseException:
            self.stop()
            raise
        self.api = Prometheus(self.url)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/-/ready", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def value(self, expr: str, *, time_s: float) -> float:
        """The one value of an expression."""
        (line,) = self.api.at(expr, time_s=time_s)
        ((_, value),) = line.points
        return value

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        finally:
            self.process.kill()
            self.process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
