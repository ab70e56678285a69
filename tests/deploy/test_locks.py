"""The locks of the images hold what the project asks for, each file of each package with its hash."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.locks.audit import report
from tests.deploy.deployment import ROOT

LOCKS = ROOT / "deploy/locks"
NAMES = ("server.txt", "demo.txt", "torch-cuda.txt", "router.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+) \\$", (LOCKS / name).read_text(), flags=re.MULTILINE))


def assert_locked(requirements: list[str], locked: dict[str, str]) -> None:
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is in no lock: run `make lock`"
        assert requirement.specifier.contains(locked[name]), f"{requirement} is locked at {locked[name]}: run `make lock`"


def test_every_requirement_of_the_server_and_of_its_traces_is_locked():
    assert_locked(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["otel"], pins("server.txt") | pins("torch-cuda.txt"))


def test_the_demo_model_is_locked():
    assert_locked(PROJECT["optional-dependencies"]["demo"], pins("demo.txt"))


def test_the_build_needs_nothing_that_is_not_locked():
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert_locked(build_system["requires"], pins("server.txt"))


def test_the_router_is_locked_at_the_version_that_is_asked_for():
    assert_locked((LOCKS / "router.in").read_text().split(), pins("router.txt"))


@pytest.mark.parametrize("name", NAMES)
def test_entries_are_versions_with_hashes_and_name_no_index(name):
    lines = [line for line in (LOCKS / name).read_text().splitlines() if not line.startswith("#")]
    entries = re.split(r"\n(?=\S)", "\n".join(lines))
    assert entries
    for entry in entries:
        assert re.fullmatch(r"[\w.-]+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry[:80]


def test_no_package_is_in_two_locks_of_one_image():
    names = [name for lock in ("server.txt", "demo.txt", "torch-cuda.txt") for name in pins(lock)]
    assert len(names) == len(set(names))


def test_an_audit_fails_for_a_known_vulnerability_and_names_the_remedy():
    bad = {"name": "a", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
    text, is_bad = report("server", [bad, {"name": "b", "version": "2.0", "vulns": []}])
    assert is_bad
    assert "a 1.0: PYSEC-1, mended in 1.1" in text


@pytest.mark.parametrize("dependencies", [[], [{"name": "a", "skip_reason": "not found"}]])
def test_an_audit_without_a_database_says_so_and_does_not_pass_for_one(dependencies):
    text, is_bad = report("server", dependencies)
    assert not is_bad
    assert "NOT AUDITED" in text
