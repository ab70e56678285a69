"""Health, readiness, models, headers, keys, CORS and body limits."""

from __future__ import annotations

import asyncio
import logging
import socket

import httpx
import pytest

from medusa_core import __version__
from medusa_core.errors import ModelLoadError
from server.app import create_app
from server.main import listen
from server.settings import ServerSettings
from tests.server.fakes import FakeClient, FakeText
from tests.server.test_bad_input import error_of

BODY = {"model": "tiny", "prompt": "Hi"}


async def test_while_loading_the_server_is_alive_but_not_ready(make_http):
    client = FakeClient(loading=asyncio.Event())
    http = await make_http(client)
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/ready")).json() == {"status": "loading"}
    assert (await http.get("/metrics")).status_code == 200
    for response in (await http.post("/v1/completions", json=BODY), await http.get("/v1/models")):
        assert error_of(response, 503)["code"] == "engine_not_ready"
        assert response.headers["retry-after"]
    client.loading.set()
    while (await http.get("/ready")).status_code != 200:
        await asyncio.sleep(0)
    assert (await http.post("/v1/completions", json=BODY)).status_code == 200


async def test_a_dead_worker_turns_health_red_until_it_is_back(make_http):
    client = FakeClient()
    http = await make_http(client)
    assert '\nmedusa_engine_up{model_name="tiny"} 1.0\n' in (await http.get("/metrics")).text
    client.is_alive = False
    assert '\nmedusa_engine_up{model_name="tiny"} 0.0\n' in (await http.get("/metrics")).text
    assert (await http.get("/health")).status_code == 503
    assert (await http.get("/ready")).status_code == 503
    assert error_of(await http.post("/v1/completions", json=BODY), 503)["code"] == "engine_not_ready"
    assert (await http.get("/v1/models")).status_code == 200
    client.is_alive = True
    assert (await http.get("/health")).status_code == 200
    assert (await http.post("/v1/completions", json=BODY)).status_code == 200


async def test_draining_refuses_new_requests_and_closes_connections(make_http):
    http = await make_http()
    http.app.state.serving.is_draining = True
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/ready")).status_code == 503
    response = await http.post("/v1/completions", json=BODY)
    assert error_of(response, 503)["code"] == "server_draining"
    assert response.headers["connection"] == "close"
    assert response.headers["retry-after"]


async def test_the_lifespan_closes_the_client_and_reports_how_loading_ended():
    client = FakeClient(load_error=ModelLoadError("No such file."))
    ended = []
    app = create_app(client, lambda info: FakeText(), ServerSettings(), on_load_end=ended.append)
    async with app.router.lifespan_context(app):
        while not ended:
            await asyncio.sleep(0)
    assert isinstance(ended[0].exception(), ModelLoadError)
    assert client.is_closed


async def test_a_failed_load_turns_health_red_and_is_logged(make_http, caplog):
    http = await make_http(FakeClient(load_error=ModelLoadError("No such file.")))
    while "No such file." not in caplog.text:
        await asyncio.sleep(0)
    assert (await http.get("/health")).status_code == 503
    assert (await http.get("/ready")).status_code == 503


async def test_models(make_http):
    http = await make_http(served_model_name=("org/a", "b"))
    cards = (await http.get("/v1/models")).json()
    assert cards["object"] == "list"
    assert [card["id"] for card in cards["data"]] == ["org/a", "b"]
    card = (await http.get("/v1/models/org/a")).json()
    assert card == cards["data"][0]
    assert (card["object"], card["root"], card["max_model_len"]) == ("model", "tiny", 256)
    assert error_of(await http.get("/v1/models/tiny"), 404)["code"] == "model_not_found"
    assert (await http.post("/v1/completions", json={**BODY, "model": "b"})).json()["model"] == "b"


async def test_version(make_http):
    assert (await (await make_http()).get("/version")).json() == {"version": __version__}


async def test_every_answer_has_an_id_and_its_processing_time(make_http):
    http = await make_http()
    for path in ("/health", "/v1/nope", "/v1/models"):
        response = await http.get(path)
        assert response.headers["x-request-id"].startswith("req_")
        assert response.headers["openai-processing-ms"].isdigit()
    given = await http.get("/health", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    for unsafe in ("a b", "x" * 129):
        response = await http.get("/health", headers={"x-request-id": unsafe})
        assert response.headers["x-request-id"].startswith("req_")


async def test_requests_with_the_same_id_do_not_meet_in_the_engine(make_http):
    client = FakeClient()
    http = await make_http(client)
    headers = {"x-request-id": "same"}
    await asyncio.gather(*(http.post("/v1/completions", json=BODY, headers=headers) for _ in range(3)))
    assert len({request.request_id for request in client.requests}) == 3


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic one", "Bearer on", "Bearer öne"])
async def test_wrong_api_keys_are_refused(make_http, header):
    http = await make_http(api_key=("one", "two"))
    headers = {} if header is None else {"authorization": header.encode()}
    response = await http.get("/v1/models", headers=headers)
    assert error_of(response, 401)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


async def test_api_keys_guard_only_the_api(make_http):
    http = await make_http(api_key=("one", "two"))
    for key in ("one", "two"):
        assert (await http.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code == 200
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert (await http.get(path)).status_code == 200


async def test_cors_is_off_by_default(make_http):
    origin = {"origin": "http://page", "access-control-request-method": "POST"}
    response = await (await make_http()).options("/v1/completions", headers=origin)
    assert "access-control-allow-origin" not in response.headers
    http = await make_http(cors_origin=("http://page",), api_key=("k",))
    assert (await http.options("/v1/completions", headers=origin)).headers["access-control-allow-origin"] == "http://page"
    page = await http.get("/health", headers={"origin": "http://page"})
    assert "x-request-id" in page.headers["access-control-expose-headers"]
    other = await http.get("/health", headers={"origin": "http://other"})
    assert "access-control-allow-origin" not in other.headers


async def test_pages_of_other_sites_cannot_keep_the_server_busy(make_http):
    client = FakeClient()
    page = {"origin": "http://page", "sec-fetch-site": "cross-site", "content-type": "text/plain"}
    refused = await (await make_http(client)).post("/v1/completions", json=BODY, headers=page)
    assert error_of(refused, 403)["code"] == "cross_site_request"
    assert "--cors-origin" in refused.json()["error"]["message"]
    assert client.requests == []
    for options, headers in (
        ({"cors_origin": ("http://page",)}, page),
        ({"cors_origin": ("*",)}, page),
        ({}, {"origin": "http://test", "sec-fetch-site": "same-origin"}),
        ({}, {"sec-fetch-site": "none"}),
    ):
        http = await make_http(client, **options)
        assert (await http.post("/v1/completions", json=BODY, headers=headers)).status_code == 200


async def test_large_bodies_are_refused_declared_or_not(make_http):
    client = FakeClient()
    http = await make_http(client, max_body_bytes=1000)

    async def chunks():
        for _ in range(20):
            yield b"x" * 100

    for content in (b"x" * 1001, chunks()):
        response = await http.post("/v1/completions", content=content)
        assert error_of(response, 413)["code"] == "request_too_large"
    assert (await http.post("/v1/completions", json=BODY)).status_code == 200


async def test_ten_megabytes_are_refused_over_a_real_connection(make_server):
    url = await make_server()
    async with httpx.AsyncClient(base_url=url) as http:
        response = await http.post("/v1/completions", content=b"x" * 10_000_000)
        assert error_of(response, 413)["code"] == "request_too_large"
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200


async def test_polling_is_logged_below_requests(make_http, caplog):
    caplog.set_level(logging.INFO, logger="server.access")
    http = await make_http()
    await http.get("/health")
    await http.post("/v1/completions", json=BODY, headers={"x-request-id": "abc"})
    (line,) = [record.getMessage() for record in caplog.records if record.name == "server.access"]
    assert line.startswith("POST /v1/completions 200 ")
    assert " ms abc " in line


@pytest.mark.parametrize(
    ("options", "is_warned"),
    [({}, True), ({"api_key": ("k",)}, False), ({"api_key_file": "keys.toml"}, False), ({"host": "127.0.0.1"}, False)],
)
def test_a_port_open_to_all_without_keys_is_warned_of(caplog, options, is_warned):
    listen(ServerSettings(**({"host": "0.0.0.0", "port": 0} | options))).close()
    assert ("--api-key" in caplog.text) == is_warned


def test_answers_on_a_connection_that_is_kept_are_not_held_back():
    """Nagle's algorithm would keep the second frame until the client has acknowledged the first: 40 ms."""
    with listen(ServerSettings(host="127.0.0.1", port=0)) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
