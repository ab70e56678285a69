"""What the text suggests, by a plain search and by tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_core.speculation.lookup import MAX_MATCH_LEN, lookup_tokens
from tests import options


def searched(known: list[int], depth: int) -> list[int]:
    """The rule in words: the longest match counts, the latest among equals; what follows is repeated up to the end of the text."""
    base = len(known) - 1

    def match_len(place: int) -> int:
        length = 0
        while length < min(MAX_MATCH_LEN, place + 1) and known[place - length] == known[base - length]:
            length += 1
        return length

    best = max(range(base), key=lambda place: (match_len(place), place), default=None)
    if best is None or match_len(best) == 0:
        return [known[-1]] * depth
    following = known[best + 1 :]
    return [following[number % len(following)] for number in range(depth)]


def found(texts: list[list[int]], depth: int) -> list[list[int]]:
    """With tokens behind each text that nobody knows yet."""
    width = max(map(len, texts)) + 5
    tokens_PL = torch.full((len(texts) + 1, width), 1)
    for lane, text in enumerate(texts):
        tokens_PL[lane + 1, : len(text)] = torch.tensor(text)
    index_B = torch.arange(len(texts)) + 1
    arguments = (tokens_PL, index_B, torch.tensor([len(text) for text in texts]))
    return lookup_tokens(*(tensor.to(options.device) for tensor in arguments), depth).tolist()


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=4), st.integers(1, 15))
def test_tensors_find_what_a_search_finds(texts, depth):
    assert found(texts, depth) == [searched(text, depth) for text in texts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([5, 6, 7, 8, 9, 5, 6], [7, 8, 9, 5, 6, 7]),
        ([5, 6, 7, 4, 6, 8, 1, 5, 6], [7, 4, 6, 8, 1, 5]),  # two tokens match in front, one later
        ([6, 7, 6, 8, 6], [8, 6, 8, 6, 8, 6]),  # the latest of equals, over and over
        ([3, 3, 3], [3] * 6),
        ([5, 6, 7], [7] * 6),  # nothing matches
        ([5], [5] * 6),
    ],
)
def test_examples(text, expected):
    assert found([text], 6) == [expected]
