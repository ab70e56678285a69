"""What can be seen of a server from outside: its CPU time in /proc, and its /metrics."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from medusa_core.errors import ConfigError

_LISTEN = "0A"
_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{[^}]*\})? ([^ ]+)(?: \d+)?")


@dataclass(frozen=True, kw_only=True)
class ServerView:
    """A server's own counters at one moment. cpu_s: of the front end's processes; None where they are not known."""

    cpu_s: float | None
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ServerFigures:
    """Between two views. frontend_us_per_frame: user and system CPU time of the front end, without the engine's process, over the
    frames that reached us. acceptance_length: as the server counts it; None where it does not tell."""

    frontend_cpu_s: float | None
    frontend_us_per_frame: float | None
    acceptance_length: float | None


def process_cpu_s(pid: int, proc: Path = Path("/proc")) -> float:
    """User and system seconds of a process, all threads, its children left out. Raises ConfigError if there is no such process."""
    try:
        stat = (proc / str(pid) / "stat").read_text()
    except OSError as error:
        raise ConfigError(f"--server-pid {pid}: {error.strerror}.") from error
    # The name, in parentheses, may hold spaces and parentheses itself. Fields 14 and 15 of proc(5), counted from 1.
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def find_listeners(port: int, proc: Path = Path("/proc")) -> list[int]:
    """Processes of this machine that listen on a TCP port, as far as this user may see them."""
    inodes = {f"socket:[{inode}]" for name in ("tcp", "tcp6") for inode in _listening_inodes(proc / "net" / name, port)}
    return sorted(int(folder.name) for folder in proc.iterdir() if folder.name.isdigit() and _holds(folder / "fd", inodes))


def is_local(host: str) -> bool:
    """True if the host's name is one of this machine's loopback."""
    try:
        return all(str(info[4][0]).startswith(("127.", "::1")) for info in socket.getaddrinfo(host, None))
    except OSError:
        return False


def parse_metrics(text: str) -> dict[str, float]:
    """Samples of a Prometheus page, summed over labels; buckets left out."""
    metrics: dict[str, float] = {}
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line)
        if match is None or match[1].endswith("_bucket"):
            continue
        try:
            value = float(match[2])
        except ValueError:
            continue
        metrics[match[1]] = metrics.get(match[1], 0.0) + value
    return metrics


def compare_views(before: ServerView, after: ServerView, num_frames: int) -> ServerFigures:
    """What happened between two views, while `num_frames` frames were received."""
    cpu_s = None if before.cpu_s is None or after.cpu_s is None else after.cpu_s - before.cpu_s
    return ServerFigures(
        frontend_cpu_s=cpu_s,
        frontend_us_per_frame=None if cpu_s is None or num_frames == 0 else cpu_s / num_frames * 1e6,
        acceptance_length=_acceptance_length(before.metrics, after.metrics),
    )


def _acceptance_length(before: dict[str, float], after: dict[str, float]) -> float | None:
    """Tokens per step with a draft, bonus included: from our histogram, else from the counters that vLLM publishes."""

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    if num_steps := grown("medusa_acceptance_length_count"):
        return grown("medusa_acceptance_length_sum") / num_steps
    if num_drafts := grown("vllm:spec_decode_num_drafts_total"):
        return 1.0 + grown("vllm:spec_decode_num_accepted_tokens_total") / num_drafts
    return None


def _listening_inodes(table: Path, port: int) -> list[str]:
    try:
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
    except OSError:
        return []
    return [row[9] for row in rows if row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port]


def _holds(folder: Path, sockets: set[str]) -> bool:
    try:
        return any(os.readlink(link) in sockets for link in folder.iterdir())
    except OSError:  # another user's process, or one that has just ended
        return False
