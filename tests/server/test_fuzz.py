"""Requests made up from the OpenAPI document, valid and not: no crash, and no answer that the document does not describe."""

from __future__ import annotations

import os
import subprocess
import sys

import httpx
import pytest

from tests.e2e.server_process import ROOT, Scrape
from tests.server.background import serve_in_thread
from tests.server.fakes import FakeClient

KEY = "key"
# What a schema cannot say makes some requests wrong that fit it: ids outside the vocabulary, prompts that are too long.
NOT_CHECKED = "positive_data_acceptance"


# A bound against hanging.
TIMEOUT_S = 1200


@pytest.mark.parametrize("num_examples", [25, pytest.param(400, marks=pytest.mark.long)])
def test_made_up_requests_get_answers_as_described(tmp_path, num_examples):
    with serve_in_thread(FakeClient(), api_key=(KEY,), log_level="error") as url:
        command = (sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {KEY}")
        options = ("--seed", "1", "--generation-database", "none", "--no-color", "--exclude-checks", NOT_CHECKED)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.server.fuzz_hooks", "NO_PROXY": "*"}
        done = subprocess.run(
            [*command, *options, "--continue-on-failure", "--max-examples", str(num_examples)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stdout
        # The requests were not all refused.
        scrape = Scrape(httpx.get(f"{url}/metrics", trust_env=False).text)
        for route in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"):
            assert scrape.value("http_requests_total", route=route, status="200") > 5
