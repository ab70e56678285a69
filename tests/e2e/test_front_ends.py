"""The real model behind two HTTP processes: the same answers, counted once, also when one of the two is killed."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.server_process import MODEL, Server, ServerSlot, until

pytestmark = [pytest.mark.demo, pytest.mark.long]
PROMPTS = ["def fibonacci(n):\n", "1, 2, 3, 4, 5, 6,", "Once upon a time", "import os\n"]


@pytest.fixture
def both(slot: ServerSlot) -> Server:
    return slot.get("--tree-size", "8", "--api-workers", "2")


def front_ends(server: Server) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "server.front_ends" in Path(f"/proc/{pid}/cmdline").read_text()]


def has_become_ready(server: Server, num_times: int) -> bool:
    """Whether front ends have said so that often."""
    return server.log.read_text().count("INFO server.serving: Ready: ") == num_times


def stream(server: Server, prompt: str) -> tuple[str, int]:
    """Text and number of tokens of a greedy completion, over a connection of its own."""
    with server.sdk(is_strict=False) as sdk:
        chunks = sdk.completions.create(
            model=MODEL, prompt=prompt, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        *texts, last = list(chunks)
    return "".join(chunk.choices[0].text for chunk in texts), last.usage.completion_tokens


def test_answers_and_counts_do_not_depend_on_who_answers(both: Server):
    alone = [both.text(prompt, max_tokens=24) for prompt in PROMPTS]
    before = both.until_idle()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: stream(both, prompt), PROMPTS * 2))
    after = both.until_idle()
    assert [text for text, _ in answers] == alone * 2
    grown = after.value("generation_tokens_total") - before.value("generation_tokens_total")
    assert grown == sum(num_tokens for _, num_tokens in answers)
    assert after.value("kv_cache_usage_perc") == 0


def test_killed_front_ends_are_replaced_and_the_engine_goes_on(both: Server):
    before = both.until_idle()
    both.http.close()
    # Both, so that only replacements can answer.
    for num_ready, victim in enumerate(front_ends(both), start=3):
        os.kill(victim, signal.SIGKILL)
        until(partial(has_become_ready, both, num_ready))
    both.http = type(both.http)(base_url=both.url, timeout=180, trust_env=False)
    answers = [stream(both, prompt) for prompt in PROMPTS]
    after = both.until_idle()
    assert (after.value("front_ends"), after.value("worker_restarts_total")) == (2, 0)
    grown = after.value("generation_tokens_total") - before.value("generation_tokens_total")
    assert grown == sum(num_tokens for _, num_tokens in answers)
