"""The Dockerfile: clean for hadolint, and in agreement with the project's own files."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.deploy.deployment import ROOT, dockerfile_stages, run_tool

TARGETS = ("cpu", "cuda", "router")
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_hadolint_has_nothing_to_say():
    assert run_tool("hadolint", "--no-color", "Dockerfile") == ""


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_user_without_name_lookup_and_stops_by_sigterm(target):
    stage = dockerfile_stages()[target]
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", stage.last("USER"))
    assert stage.last("STOPSIGNAL") == "SIGTERM"
    assert stage.health_check[0] == "healthcheck"


@pytest.mark.parametrize("target", TARGETS)
def test_labels_tell_the_version_of_the_project(target):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'org.opencontainers.image.version="{version}"' in dockerfile_stages()[target].last("LABEL")


def test_the_default_target_is_the_cpu_image():
    assert list(dockerfile_stages())[-1] == "cpu"


def test_the_base_image_is_pinned_by_a_patch_version():
    assert re.search(r"^ARG PYTHON_IMAGE=python:\d+\.\d+\.\d+-slim-\w+$", DOCKERFILE, flags=re.MULTILINE)


def test_one_version_of_torch_everywhere():
    argument = re.search(r"TORCH_VERSION=(\S+)", DOCKERFILE)[1]
    assert f"torch=={argument} \\" in (ROOT / "deploy/locks/torch-cuda.txt").read_text()
    assert f"TORCH := torch=={argument}\n" in (ROOT / "Makefile").read_text()


def test_every_package_that_is_installed_comes_from_a_lock_but_torch_for_cpus():
    installs = [line.strip() for line in DOCKERFILE.splitlines() if "pip install" in line]
    assert installs
    unlocked = [line for line in installs if "--require-hashes" not in line]
    assert [line for line in unlocked if "TORCH_INDEX" not in line and "--no-build-isolation ." not in line] == []
    assert [line for line in installs if "--no-deps" not in line] == []


def test_the_build_context_is_what_the_images_are_built_from():
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    copied = {name for line in copies for name in line.split()}
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    assert {next(root for root in kept if name == root or name.startswith(f"{root}/")) for name in copied} == kept
