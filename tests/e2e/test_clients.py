"""Others' clients, as published, against the demo model. `make clients` installs them, in environments of their own."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.e2e.server_process import MODEL, REQUEST_TIMEOUT_S, ROOT, Server

pytestmark = [pytest.mark.demo, pytest.mark.long]

INSTALLED = ROOT / "build" / "clients"
SCRIPTS = Path(__file__).parent / "clients"
# A bound against hanging.
CLIENT_TIMEOUT_S = 600
CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
OPTIONS = {"model": MODEL, "messages": CAPITAL, "temperature": 0, "max_tokens": 24}
# Model prices and data sets would be fetched; all that is needed is here.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}


def program(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is missing: run `make clients`")
    return path


def run(*command: object, cwd: Path | None = None, **environment: object) -> None:
    """Run a client to its end. What it prints is shown if it fails."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables = {**inherited, **OFFLINE, **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=CLIENT_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout


async def test_openai_async(server: Server):
    http = httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, trust_env=False)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, http_client=http) as client:
        answers = await asyncio.gather(*(client.chat.completions.create(**OPTIONS) for _ in range(3)))
        assert all("Paris" in answer.choices[0].message.content for answer in answers)
        stream = await client.chat.completions.create(**OPTIONS, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == answers[0].choices[0].message.content


def test_openai_streaming_helper(server: Server):
    with server.sdk().chat.completions.stream(**OPTIONS, n=2) as stream:
        deltas = [event for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert len(deltas) > 2
    assert [choice.finish_reason for choice in final.choices] == ["stop", "stop"]
    assert all("Paris" in choice.message.content for choice in final.choices)


class Capital(BaseModel):
    country: str
    capital: str


def test_openai_parse(server: Server):
    sdk = server.sdk()
    options = {**OPTIONS, "response_format": Capital, "max_tokens": 40}
    assert sdk.chat.completions.parse(**options).choices[0].message.parsed.capital == "Paris"
    with sdk.chat.completions.stream(**options) as stream:
        assert stream.get_final_completion().choices[0].message.parsed.capital == "Paris"
    response = sdk.responses.parse(model=MODEL, input=CAPITAL, text_format=Capital, temperature=0, max_output_tokens=40)
    assert response.output_parsed.capital == "Paris"


@pytest.mark.parametrize("client", ["langchain", "litellm", "pydantic_ai"])
def test_python_clients(server: Server, client: str):
    run(program(INSTALLED / "python" / "bin" / "python"), SCRIPTS / f"use_{client}.py", server.url, MODEL)


def test_openai_node(server: Server):
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        pytest.skip("Node and npm are not installed")
    packages = program(INSTALLED / "node" / "node_modules")
    run(node, SCRIPTS / "use_openai_node.cjs", server.url, MODEL, NODE_PATH=packages)


def test_lm_eval(server: Server, tmp_path: Path):
    """Two tiny tasks: one scores given answers by their log-probabilities, one generates. The tokenizer is the server's own."""
    program_path = program(INSTALLED / "lm-eval" / "bin" / "lm_eval")
    model = f"model={MODEL},base_url={server.url}/v1/completions,tokenizer_backend=remote,num_concurrent=2,max_retries=1"
    tasks = ("--tasks", "medusa_capitals,medusa_counting", "--include_path", ".", "--output_path", tmp_path / "results")
    run(program_path, "--model", "local-completions", "--model_args", model, *tasks, cwd=SCRIPTS / "tasks", HF_HOME=tmp_path)
    (results,) = (tmp_path / "results").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    assert scores["medusa_capitals"]["acc,none"] == 1.0
    assert scores["medusa_counting"]["exact_match,stripped"] == 1.0
