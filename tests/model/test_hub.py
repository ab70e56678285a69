"""Names to local paths, against a small hub of our own on a local port."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from medusa_core.errors import ConfigError, ModelLoadError
from medusa_core.model import hub

COMMIT = "c0ffee" + "0" * 34


class MockHub(ThreadingHTTPServer):
    """Serves `repos[id][file] = bytes` with the parts of the hub's API that downloads use, and records the files fetched."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: MockHub

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, has_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        is_api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        repo = "/".join(parts[:2])
        files = self.server.repos.get(repo)
        if files is None:
            return self._error(404, "RepoNotFound")
        if repo in self.server.gated:
            return self._error(403, "GatedRepo")
        if parts[3] not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound")
        if is_api:
            entries = [
                {"type": "file", "path": name, "rfilename": name, "size": len(body), "oid": _etag(body)}
                for name, body in files.items()
            ]
            info = (
                entries
                if parts[2] == "tree"
                else {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": entries}
            )
            return self._send(json.dumps(info).encode(), "application/json", has_body)
        name = "/".join(parts[4:])
        if name not in files:
            return self._error(404, "EntryNotFound")
        if has_body:
            self.server.fetched.append(name)
        return self._send(files[name], "application/octet-stream", has_body, {"ETag": f'"{_etag(files[name])}"'})

    def _send(self, body: bytes, content_type: str, has_body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Type": content_type, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def mock_hub(tmp_path: Path, monkeypatch) -> Iterator[MockHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    server = MockHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _resolve(server: MockHub, name: str, revision: str | None = None) -> Path:
    return hub.resolve(name, revision=revision, endpoint=server.address, progress=False)


def test_a_repository_comes_without_what_is_not_needed(mock_hub) -> None:
    mock_hub.repos["org/model"] = {
        "config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"pickled", "tokenizer.json": b"{}",
        "chat_template.jinja": b"x", "README.md": b"long", "original/consolidated.safetensors": b"again", "q4.gguf": b"packed",
    }  # fmt: skip
    folder = _resolve(mock_hub, "org/model")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_pickled_weights_are_fetched_only_without_safetensors(mock_hub) -> None:
    mock_hub.repos["org/heads"] = {"config.json": b"{}", "medusa_lm_head.pt": b"pickled"}
    assert (_resolve(mock_hub, "org/heads") / "medusa_lm_head.pt").read_bytes() == b"pickled"


def test_a_second_run_uses_the_cache(mock_hub) -> None:
    mock_hub.repos["org/model"] = {"config.json": b"{}", "model.safetensors": b"weights"}
    first = _resolve(mock_hub, "org/model")
    num_fetched = len(mock_hub.fetched)
    assert _resolve(mock_hub, "org/model") == first
    assert len(mock_hub.fetched) == num_fetched


def test_the_cache_serves_when_the_hub_is_gone(mock_hub) -> None:
    mock_hub.repos["org/model"] = {"config.json": b"{}", "model.safetensors": b"weights"}
    first = _resolve(mock_hub, "org/model")
    assert hub.resolve("org/model", endpoint="http://127.0.0.1:9", progress=False) == first


def test_one_file_of_a_repository_by_path(mock_hub) -> None:
    mock_hub.repos["org/model-gguf"] = {"model-q4.gguf": b"packed", "model-q8.gguf": b"larger"}
    assert _resolve(mock_hub, "org/model-gguf/model-q4.gguf").read_bytes() == b"packed"
    assert mock_hub.fetched == ["model-q4.gguf"]


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("org/missing", None, "no hub repository 'org/missing'"),
        ("org/model", "no-such-branch", "no revision 'no-such-branch'.*--revision"),
        ("org/gated", None, "gated.*HF_TOKEN"),
        ("org/empty", None, r"no weights.*org/empty/<file>\.gguf"),
        ("org/model/other.gguf", None, "has no file 'other.gguf'"),
    ],
)
def test_what_the_hub_does_not_have_is_an_error_with_a_remedy(mock_hub, name, revision, message) -> None:
    mock_hub.repos |= {
        "org/model": {"model.safetensors": b"x"},
        "org/gated": {"a.safetensors": b"x"},
        "org/empty": {"a.gguf": b"x"},
    }
    mock_hub.gated.add("org/gated")
    with pytest.raises(ModelLoadError, match=message):
        _resolve(mock_hub, name, revision)


@pytest.mark.parametrize("name", ["org/model", "org/model/file.gguf"])
def test_no_network_is_an_error_with_a_remedy(mock_hub, name) -> None:
    with pytest.raises(ModelLoadError, match="cannot be reached"):
        hub.resolve(name, endpoint="http://127.0.0.1:9", progress=False)


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "missing.gguf", "~/missing", "a b", "", "org/model/extra"])
def test_names_that_are_neither_a_path_nor_an_id_are_refused_without_asking_the_hub(mock_hub, name) -> None:
    with pytest.raises(ModelLoadError, match=r"no file or folder|neither a path"):
        _resolve(mock_hub, name)


def test_a_path_that_exists_is_taken_as_it_is(mock_hub, tmp_path) -> None:
    assert _resolve(mock_hub, str(tmp_path)) == tmp_path


def test_a_revision_of_a_path_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="has no revision 'v1'"):
        hub.resolve(str(tmp_path), revision="v1")
