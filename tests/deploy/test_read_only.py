"""The server with the demo model on a read-only root: it writes where the Kubernetes deployment mounts something, and nowhere else.

The container is made by hand: a mount namespace in which all of the machine is read-only but for the deployment's mounts.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.deploy.deployment import ROOT, dockerfile_stages, run_tool
from tests.deploy.test_entry_points import free_port

# Against hanging; tests share small machines, and the model is unpacked anew.
START_TIMEOUT_S = 480


def has_namespaces() -> bool:
    probe = ["unshare", "--mount", "sh", "-c", "mount --make-rprivate / && mount -o remount,ro,bind / && setpriv --version"]
    return (
        all(map(shutil.which, ("unshare", "setpriv"))) and subprocess.run(probe, capture_output=True, check=False).returncode == 0
    )


def read_only_script(mounts: list[str], home: str, command: list[str]) -> str:
    """Shell script that runs a command, with no capabilities, where only `mounts` can be written."""
    # Mounts that hide the code, if it lies under one of them: it is brought back to where it was.
    code = {str(path) for path in (ROOT, Path(sys.prefix)) if any(path.is_relative_to(mount) for mount in mounts)}
    lines = [
        "set -e",
        "mount --make-rprivate /",
        "mount -t tmpfs tmpfs /mnt",
        f"mount -t tmpfs tmpfs {Path(home).parent}",
        f"mkdir {home}",
    ]
    lines += [f"mkdir /mnt/{index} && mount --bind {shlex.quote(path)} /mnt/{index}" for index, path in enumerate(sorted(code))]
    lines += [f"mkdir -p {mount} && mount -t tmpfs -o mode=1777 tmpfs {mount}" for mount in mounts]
    for index, path in enumerate(sorted(code)):
        target = shlex.quote(path)
        lines += [f"mkdir -p {target} && mount --move /mnt/{index} {target} && mount -o remount,ro,bind {target}"]
    lines += [f"mount -o remount,ro {Path(home).parent}", "mount -o remount,ro,bind /", f"cd {home}"]
    # The script is worth nothing if this can be written.
    lines += [f"if touch {home}/x 2>&-; then exit 99; fi"]
    return "\n".join([*lines, f"exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all {shlex.join(command)}"])


@pytest.mark.long
@pytest.mark.demo
@pytest.mark.skipif(not has_namespaces(), reason="mount namespaces are not allowed here: it takes root, as in CI")
def test_the_server_writes_only_where_the_deployment_mounts_something():
    overlay = yaml.safe_load_all(run_tool("kubectl", "kustomize", str(ROOT / "deploy/k8s/overlays/single")))
    (deployment,) = (resource for resource in overlay if resource["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    mounts = sorted(mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly"))
    stage = dockerfile_stages()["cuda"]
    port = free_port()
    arguments = [str(port) if argument == "8000" else argument for argument in stage.entry_point[1:]]
    command = [sys.executable, "-c", "from server.main import main; main()", *arguments]
    environment = {"PATH": os.environ["PATH"], "HOME": stage.last("WORKDIR"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script = read_only_script(mounts, stage.last("WORKDIR"), command)
    process = subprocess.Popen(["unshare", "--mount", "sh", "-c", script], env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as http:
            wait_until_ready(http, process)
            body = {"model": http.get("/v1/models").json()["data"][0]["id"], "prompt": "def f(", "max_tokens": 8}
            reply = http.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


def wait_until_ready(http: httpx.Client, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, f"the server has ended with {process.returncode}"
        assert time.monotonic() < deadline, f"not ready within {START_TIMEOUT_S} s"
        try:
            if http.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
