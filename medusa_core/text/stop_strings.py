"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from medusa_core.errors import InvalidParameterError


class StopMatcher:
    """Passes text through until a stop string is complete, and holds back what may be the start of one.

    The stop string that is *completed* first wins; of several completed by the same character, the longest. That depends on the
    text alone, not on the pieces it comes in.
    """

    def __init__(self, stop: Sequence[str], *, is_included: bool = False) -> None:
        """`is_included`: the stop string stays in the text. Raises InvalidParameterError for an empty stop string."""
        if "" in stop:
            raise InvalidParameterError("stop must not contain an empty string.", param="stop")
        self._stop = tuple(stop)
        self._is_included = is_included
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The text that is certain. After a match the rest is dropped and `is_stopped` is True."""
        if self.is_stopped or not self._stop:
            return "" if self.is_stopped else text
        # What is held is the longest possible start of a stop string, so no match can begin before it.
        text = self._held + text
        match = self._first_match(text)
        if match is not None:
            start, end = match
            self.is_stopped, self._held = True, ""
            return text[: end if self._is_included else start]
        num_held = self._num_undecided(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """The text held back, at the end of the output."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the match that ends first, then starts first."""
        spans = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if not spans:
            return None
        end, start = min(spans)
        return start, end

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for start in range(len(text) - longest, len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return len(text) - start
        return 0
