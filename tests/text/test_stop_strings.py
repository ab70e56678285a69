"""Stop strings are found whatever the pieces; what may begin one is not sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_core.errors import InvalidParameterError
from medusa_core.text.stop_strings import StopMatcher

LETTERS = st.text(alphabet="aab", max_size=12)
STOPS = st.lists(st.text(alphabet="aab", min_size=1, max_size=4), max_size=4)


def expected(text: str, stop: list[str], *, is_included: bool) -> tuple[str, bool]:
    """Look at the text character by character, the plain way."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end if is_included else end - max(map(len, complete))], True
    return text, False


@given(pieces=st.lists(LETTERS, max_size=8), stop=STOPS, is_included=st.booleans())
def test_text_ends_at_the_stop_string_completed_first(pieces, stop, is_included):
    matcher = StopMatcher(stop, is_included=is_included)
    text = "".join(matcher.push(piece) for piece in pieces) + matcher.flush()
    assert (text, matcher.is_stopped) == expected("".join(pieces), stop, is_included=is_included)


@given(pieces=st.lists(LETTERS, max_size=8), stop=STOPS)
def test_exactly_what_may_begin_a_stop_string_is_held_back(pieces, stop):
    matcher = StopMatcher(stop)
    pushed, sent = "", ""
    for piece in pieces:
        pushed += piece
        sent += matcher.push(piece)
        if matcher.is_stopped:
            return
        held = pushed[len(sent) :]
        assert sent + held == pushed
        starts = [pushed[i:] for i in range(len(pushed)) if any(s.startswith(pushed[i:]) for s in stop)]
        assert held == max(starts, key=len, default="")


def test_of_stop_strings_completed_together_the_longest_counts():
    assert StopMatcher(["b", "aab"]).push("xaab") == "x"


def test_text_after_the_stop_string_is_dropped():
    matcher = StopMatcher(["END"], is_included=True)
    assert matcher.push("oneENDtwo") == "oneEND"
    assert matcher.push("three") == ""
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidParameterError, match="empty") as caught:
        StopMatcher(["", "a"])
    assert caught.value.param == "stop"
