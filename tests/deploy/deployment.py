"""What the deployment files say, as their own tools read them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TOOLS = Path(sysconfig.get_path("scripts"))


def load_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def run_tool(name: str, *arguments: str, cwd: Path = ROOT, **variables: str) -> str:
    """Standard output of a program of the development environment. Fails with what it had to say."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("COMPOSE_", "GRAFANA_"))}
    command = [str(TOOLS / name), *arguments]
    result = subprocess.run(command, cwd=cwd, env={**kept, **variables}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{name} {' '.join(arguments)}:\n{result.stdout}{result.stderr}"
    return result.stdout


@cache
def compose_services(*arguments: str) -> dict[str, dict[str, Any]]:
    """Services that docker compose starts with these arguments, as it understands the files."""
    return json.loads(run_tool("docker-compose", *arguments, "config", "--format", "json"))["services"]


@dataclass(frozen=True)
class Stage:
    """One stage of the Dockerfile: (instruction, rest of the line) from the base image on."""

    instructions: tuple[tuple[str, str], ...]

    def last(self, instruction: str) -> str:
        return [rest for name, rest in self.instructions if name == instruction][-1]

    @property
    def entry_point(self) -> list[str]:
        return json.loads(self.last("ENTRYPOINT"))

    @property
    def health_check(self) -> list[str]:
        return json.loads(self.last("HEALTHCHECK").split("CMD ", 1)[1])


def dockerfile_stages() -> dict[str, Stage]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, Stage] = {}
    name = ""
    for line in filter(None, text.splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            parent, _, name = rest.partition(" AS ")
            stages[name] = stages.get(parent, Stage(()))
        elif name:
            stages[name] = Stage((*stages[name].instructions, (instruction, rest.strip())))
    return stages
