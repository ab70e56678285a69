"""The router's arguments in the overlay `replicas`, with a stand-in for the Kubernetes API: it finds the server's pod and asks it.

The stand-in answers what the overlay's role allows, lists and watches of pods, and refuses the rest.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import yaml

from tests.deploy.deployment import ROOT, run_tool
from tests.deploy.test_entry_points import ROUTER, START_TIMEOUT_S, check_health, free_port, running, wait_until_healthy
from tests.server.background import serve_in_thread
from tests.server.fakes import FakeClient

NAMESPACE = "medusa"


def manifest(kind: str, name: str) -> dict:
    resources = yaml.safe_load_all(run_tool("kubectl", "kustomize", str(ROOT / "deploy/k8s/overlays/replicas")))
    return next(resource for resource in resources if (resource["kind"], resource["metadata"]["name"]) == (kind, name))


def pod(template: dict, name: str) -> dict:
    """A pod of the template as the API tells of it once it runs."""
    metadata = {"name": name, "namespace": NAMESPACE, "uid": name, "resourceVersion": "1", "labels": template["metadata"]["labels"]}
    status = {"phase": "Running", "podIP": "127.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": []}, "status": status}


class PodApi(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path != f"/api/v1/namespaces/{NAMESPACE}/pods":
            self.send_error(403)
            return
        is_watch = "watch" in parse_qs(url.query)
        self.server.verbs.add("watch" if is_watch else "list")
        if is_watch:
            self._send_events()
        else:
            body = {"apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": "1"}, "items": self.server.pods}
            self._start(json.dumps(body).encode())

    def _send_events(self) -> None:
        self._start(None)
        self.server.is_deleted.wait()
        (pod,) = self.server.pods
        going = {**pod, "metadata": {**pod["metadata"], "resourceVersion": "2", "deletionTimestamp": "2026-01-01T00:00:00Z"}}
        for kind in ("MODIFIED", "DELETED"):
            event = json.dumps({"type": kind, "object": going}).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            self.wfile.flush()
        self.server.is_over.wait()

    def _start(self, body: bytes | None) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header(*(("transfer-encoding", "chunked") if body is None else ("content-length", str(len(body)))))
        self.end_headers()
        self.wfile.write(body or b"")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running_api(pods: list[dict]):
    server = ThreadingHTTPServer(("127.0.0.1", 0), PodApi)
    server.pods, server.verbs, server.is_deleted, server.is_over = pods, set(), threading.Event(), threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.is_deleted.set()
        server.is_over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def wait_until_unhealthy(test: list[str], port: int, otherwise: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while check_health(test, port) == 0:
        assert time.monotonic() < deadline, otherwise


# Short, and among the long ones because `make test` does not install the router.
@pytest.mark.long
@pytest.mark.skipif(ROUTER is None, reason="vllm-router is not installed: `make scale` does it")
def test_the_router_finds_the_servers_pods_heeds_their_readiness_and_forgets_a_deleted_one(tmp_path, monkeypatch):
    (container,) = manifest("Deployment", "medusa-router")["spec"]["template"]["spec"]["containers"]
    template = manifest("Deployment", "medusa-server")["spec"]["template"]
    port, metrics_port = free_port(), free_port()
    client = FakeClient()
    with serve_in_thread(client, api_key=("key",)) as url, running_api([pod(template, "medusa-server-1")]) as api:
        replacements = {"$(NAMESPACE)": NAMESPACE, "port=8000": f"port={httpx.URL(url).port}", "29000": str(metrics_port)}
        arguments = container["args"]
        for old, new in replacements.items():
            arguments = [argument.replace(old, new) for argument in arguments]
        config = {
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{api.server_address[1]}"}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        (tmp_path / "config").write_text(yaml.safe_dump(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        readiness, liveness = (
            ["CMD", "healthcheck", f"http://127.0.0.1:8000{container[f'{kind}Probe']['httpGet']['path']}"]
            for kind in ("readiness", "liveness")
        )
        with running([ROUTER, "--host", "127.0.0.1", "--port", str(port), *arguments]) as router:
            wait_until_healthy(readiness, port, router)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
                models = http.get("/v1/models", headers={"authorization": "Bearer key"})
                assert models.json()["data"][0]["id"] == "tiny"
                # Clients' keys are passed on, and it is the servers that ask for them.
                assert http.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
            # A kubelet would end the router for a red liveness probe, and with it the streams of all other servers.
            client.is_alive = False
            wait_until_unhealthy(readiness, port, "the router keeps a pod that is not ready")
            assert check_health(liveness, port) == 0
            assert '{method="GET",route="/ready",status="503"}' in httpx.get(f"{url}/metrics", trust_env=False).text
            client.is_alive = True
            wait_until_healthy(readiness, port, router)
            api.is_deleted.set()
            wait_until_unhealthy(readiness, port, "the router keeps a pod that is being deleted")
    (rule,) = manifest("Role", "medusa-router")["rules"]
    assert rule["resources"] == ["pods"]
    assert api.verbs <= set(rule["verbs"])
