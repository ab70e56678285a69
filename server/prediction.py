"""How much of a predicted output came true, for usage."""

from __future__ import annotations

from collections.abc import Sequence


class PredictionCount:
    """Follows one choice's output along the prediction, token by token.

    Where the two part, it goes on at the next place of the prediction that holds the latest two tokens. Each predicted token counts
    once.
    """

    def __init__(self, prediction: Sequence[int]) -> None:
        self._prediction = prediction
        self._accepted: set[int] = set()
        # where the output would go on as predicted
        self._next = 0
        self._last: int | None = None
        # places behind each pair of tokens, in order
        self._behind: dict[tuple[int, int], list[int]] = {}
        for place in range(1, len(prediction)):
            self._behind.setdefault((prediction[place - 1], prediction[place]), []).append(place + 1)

    @property
    def num_accepted(self) -> int:
        return len(self._accepted)

    @property
    def num_rejected(self) -> int:
        return len(self._prediction) - len(self._accepted)

    def add(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if self._next < len(self._prediction) and self._prediction[self._next] == token_id:
                self._next += 1
                self._accepted.add(self._next - 1)
            elif self._last is not None and (places := self._behind.get((self._last, token_id))):
                self._next = next((place for place in places if place > self._next), places[-1])
                self._accepted |= {self._next - 2, self._next - 1}
            self._last = token_id
