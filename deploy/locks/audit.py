"""Looks up known vulnerabilities of every package in the locks (`make audit`).

Exits with 1 if there are any. Where no database of vulnerabilities can be reached nothing is audited; that is said in capitals, and
is no failure: the hashes in the locks still hold the images to the packages that were once chosen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCKS = Path(__file__).parent
# What is installed together, and is audited together.
IMAGES = {"server": ("server.txt", "demo.txt", "torch-cuda.txt"), "router": ("router.txt",)}
# PyPI's own advisories, and the database from which they come.
SERVICES = ("pypi", "osv")
TIMEOUT_S = 15


def audit(names: tuple[str, ...], service: str) -> list[dict[str, Any]]:
    """One record per package. The records say why a package could not be audited; without a connection there are none."""
    command = ["pip-audit", "--disable-pip", "--require-hashes", "--format", "json", "--progress-spinner", "off"]
    command += ["--vulnerability-service", service, "--timeout", str(TIMEOUT_S)]
    command += [argument for name in names for argument in ("--requirement", str(LOCKS / name))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        dependencies: list[dict[str, Any]] = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        return []
    return dependencies


def report(image: str, dependencies: list[dict[str, Any]]) -> tuple[str, bool]:
    """(lines for a person, is something wrong) about the packages of one image."""
    audited = [dependency for dependency in dependencies if "skip_reason" not in dependency]
    if not audited:
        return f"{image}: NOT AUDITED, no database of vulnerabilities answers here.", False
    lines = [f"{image}: {len(audited)} of {len(dependencies)} packages audited."]
    lines += [
        f"  {dependency['name']}: not audited, {dependency['skip_reason']}"
        for dependency in dependencies
        if dependency not in audited
    ]
    found = [(dependency, vulnerability) for dependency in audited for vulnerability in dependency["vulns"]]
    for dependency, vulnerability in found:
        fixes = ", ".join(vulnerability["fix_versions"]) or "no release yet"
        lines.append(f"  {dependency['name']} {dependency['version']}: {vulnerability['id']}, mended in {fixes}")
    return "\n".join(lines), bool(found)


def main() -> int:
    is_bad = False
    for image, names in IMAGES.items():
        dependencies: list[dict[str, Any]] = []
        for service in SERVICES:
            dependencies = audit(names, service)
            if any("skip_reason" not in dependency for dependency in dependencies):
                break
        text, is_vulnerable = report(image, dependencies)
        print(text)
        is_bad |= is_vulnerable
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
