"""Speculation changes the speed, never the text: the same requests with and without it, over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.server_process import MODEL, Server, ServerSlot

pytestmark = pytest.mark.demo

PLAIN = {"speculative": {"enabled": False}}
PROMPTS = [
    "def quicksort(items):\n",
    "import numpy as np\n\n# A function that normalises the rows of a matrix\ndef",
    "SELECT customers.name, COUNT(orders.id) FROM customers",
    '{"name": "Ada Lovelace", "born": 1815, "fields": [',
    "#include <stdio.h>\n\nint main(void) {\n",
    "class Stack:\n    def __init__(self):\n",
    "<html>\n<head>\n<title>",
    "for f in *.txt; do",
    "1 1 2 3 5 8 13 21 34",
    "The capital of France is",
    "Once upon a time there was a lighthouse keeper who",
    "Dear Sir or Madam,\n\nI am writing to",
    "Translate to German: Good morning, how are you?\n",
    "Question: Why is the sky blue?\nAnswer:",
    "Ingredients for a pancake:\n-",
    "La ville de Lyon est située",
    "春天来了，",
    "A haiku about autumn:\n",
    "User: What is 17 * 23?\nAssistant: Let me think step by step.",
    "The three laws of motion, in one sentence each:\n1.",
]


def texts(server: Server, **fields: Any) -> dict[str, str]:
    """All prompts in one request: a batch of twenty."""
    choices = server.complete(PROMPTS, **fields)["choices"]
    return {prompt: choice["text"] for prompt, choice in zip(PROMPTS, choices, strict=True)}


def test_the_first_tokens_are_equal_in_sixteen_bits(server: Server):
    """Only the first, because a near-tie may fall either way when rows of a tree share a matrix product."""
    confident = ["1, 2, 3, 4, 5, 6, 7, 8, 9, 10,", "def fibonacci(n):\n    if n <= 1:\n", "a b c d e f g h"]
    for prompt in confident:
        assert server.text(prompt, max_tokens=8) == server.text(prompt, max_tokens=8, **PLAIN)


@pytest.fixture
def float32_server(slot: ServerSlot) -> Server:
    # The size is given because plain steps can be the faster ones in float32, and nothing would be compared.
    return slot.get("--dtype", "float32", "--max-model-len", "2048", "--tree-size", "8")


@pytest.mark.long
def test_greedy_texts_are_equal_in_float32(float32_server: Server):
    before = float32_server.until_idle()
    speculative = texts(float32_server, max_tokens=48)
    after = float32_server.until_idle()
    assert after.value("spec_decode_num_accepted_tokens_total") > before.value("spec_decode_num_accepted_tokens_total")
    assert speculative == texts(float32_server, max_tokens=48, **PLAIN)


@pytest.mark.long
def test_sampled_texts_depend_on_the_seed_alone(float32_server: Server):
    """Alone, all at once, and without speculation: the same seeds give the same texts."""
    prompts = PROMPTS[:6]

    def sample(number: int, **fields: Any) -> str:
        return float32_server.text(prompts[number], temperature=0.9, top_p=0.95, seed=number, max_tokens=16, **fields)

    alone = [sample(number) for number in range(len(prompts))]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(sample, range(len(prompts))))
    assert together == alone
    assert [sample(number, **PLAIN) for number in range(len(prompts))] == alone


@pytest.mark.long
def test_streamed_texts_are_the_whole_ones(float32_server: Server):
    for prompt in PROMPTS[-2:]:
        stream = float32_server.sdk(is_strict=False).completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=32, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == float32_server.text(prompt, max_tokens=32)
