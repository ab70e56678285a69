"""What vllm-router does with which path, as docs/scaling.md tells it. It is somebody else's: a newer one may do otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.deploy.deployment import compose_services
from tests.deploy.test_entry_points import ROUTER, free_port, running, wait_until_healthy
from tests.e2e.server_process import Scrape
from tests.server.background import serve_in_thread
from tests.server.fakes import FakeClient

PROMPT = {"model": "tiny", "prompt": "Hi"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
RIGHT_KEY = {"authorization": "Bearer key"}
# Short, and among the long ones because `make test` does not install the router.
pytestmark = [pytest.mark.long, pytest.mark.skipif(ROUTER is None, reason="vllm-router is not installed: `make scale` does it")]


@pytest.fixture(scope="module")
def servers() -> Iterator[list[str]]:
    """URLs of two servers with a key."""
    with serve_in_thread(FakeClient(), api_key=("key",)) as first, serve_in_thread(FakeClient(), api_key=("key",)) as second:
        yield [first, second]


@pytest.fixture(scope="module")
def router(servers) -> Iterator[httpx.Client]:
    """A client of the router, which runs before the servers with compose's flags."""
    service, port = compose_services("--profile", "scale")["router"], free_port()
    flags = [flag for flag in service["command"] if "=" in flag and not flag.startswith("--prometheus")]
    command = [ROUTER, "--port", str(port), "--prometheus-port", str(free_port()), "--worker-urls", *servers, *flags]
    with running(command) as process, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        wait_until_healthy(service["healthcheck"]["test"], port, process)
        yield client


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT), ("/v1/models", None)])
def test_keys_reach_the_servers(router, path, body):
    assert router.request("POST" if body else "GET", path, json=body, headers=RIGHT_KEY).status_code == 200
    assert router.request("POST" if body else "GET", path, json=body).status_code == 401


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"model": "tiny", "input": "Hi"}),
        ("/tokenize", PROMPT),
        ("/detokenize", {"model": "tiny", "tokens": [72]}),
        ("/tokenizer_info", None),
        ("/v1/models/tiny", None),
    ],
)
def test_keys_are_lost_on_the_way(router, servers, path, body):
    method = "POST" if body else "GET"
    assert httpx.request(method, servers[0] + path, json=body, headers=RIGHT_KEY, trust_env=False).status_code == 200
    assert router.request(method, path, json=body, headers=RIGHT_KEY).status_code == 401


def test_anybody_manages_the_router_without_a_key(router, servers):
    assert set(router.get("/list_workers").json()["urls"]) == set(servers)
    assert {worker["url"] for worker in router.get("/workers").json()["workers"]} == set(servers)
    assert router.post("/remove_worker", params={"url": servers[0]}).status_code == 200
    assert router.get("/list_workers").json()["urls"] == [servers[1]]
    assert router.post("/add_worker", params={"url": servers[0]}).status_code == 200
    assert set(router.get("/list_workers").json()["urls"]) == set(servers)


def test_pages_of_all_sites_may_read_its_answers(router):
    assert router.get("/list_workers", headers={"origin": "https://example.com"}).headers["access-control-allow-origin"] == "*"


def test_with_cache_aware_each_server_is_asked_twice_about_each_prompt(router, servers):
    def num_asked(server: str) -> list[float]:
        scrape = Scrape(httpx.get(f"{server}/metrics", trust_env=False).text)
        asked = {"/tokenize": 200, "unmatched": 404}
        return [scrape.value("http_requests_total", route=route, status=str(status)) for route, status in asked.items()]

    before = [num_asked(server) for server in servers]
    for _ in range(3):
        router.post("/v1/completions", json=PROMPT, headers=RIGHT_KEY)
    assert [[count + 3 for count in counts] for counts in before] == [num_asked(server) for server in servers]
