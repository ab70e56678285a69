"""Servers with other options than the default ones."""

from __future__ import annotations

import pytest

from tests.e2e.server_process import ServerSlot

pytestmark = [pytest.mark.demo, pytest.mark.long]


def test_without_heads_and_lookup_it_serves_by_plain_decoding(slot: ServerSlot):
    server = slot.get("--heads", "none", "--no-prompt-lookup")
    assert server.text("1, 2, 3, 4, 5,", max_tokens=8).startswith(" 6, 7")
    scrape = server.until_idle()
    assert scrape.value("spec_decode_num_drafts_total") == 0
    assert scrape.value("plain_steps_total") == 7


def test_a_cache_of_one_request_serves_many(slot: ServerSlot):
    """Choices that do not fit are preempted or wait, and all come to their end."""
    server = slot.get("--max-model-len", "128", "--num-blocks", "13", "--served-model-name", "small", "demo")
    body = {"model": "demo", "prompt": "1, 2, 3,", "max_tokens": 64, "n": 6, "seed": 3, "ignore_eos": True}
    response = server.http.post("/v1/completions", json=body)
    assert response.json()["usage"]["completion_tokens"] == 6 * 64
    assert server.until_idle().value("kv_cache_usage_perc") == 0
