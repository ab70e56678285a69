"""The figures of a run."""

from __future__ import annotations

import pytest

from medusa_core.cli.run import RunReport
from medusa_core.outputs import FinishReason, TokenDelta


def delta(*token_ids: int, **fields: object) -> TokenDelta:
    return TokenDelta(request_id="prompt", choice_idx=0, token_ids=list(token_ids), **fields)


@pytest.fixture
def report() -> RunReport:
    """A first token, a plain step, two draft steps."""
    report = RunReport()
    report.add(delta(5, is_first=True))
    report.add(delta(6))
    report.add(delta(7, 8, 9, num_draft_nodes=15, draft_depth=4, num_accepted=2))
    report.add(delta(10, num_draft_nodes=15, draft_depth=4, finish_reason=FinishReason.STOP))
    return report


def test_tokens_and_reason(report):
    assert report.token_ids == [5, 6, 7, 8, 9, 10]
    assert report.finish_reason is FinishReason.STOP


def test_the_first_token_is_no_step(report):
    assert report.num_steps == 3


def test_acceptance_length_is_over_draft_steps_with_their_bonus(report):
    assert report.num_draft_steps == 2
    assert report.acceptance_length == (3 + 1) / 2


def test_speed(report):
    report.total_s, report.first_token_s = 2.0, 0.5
    assert report.tokens_per_second == 3.0
    assert report.summary() == (
        "6 tokens in 2.00 s · 3.0 tokens/s · first token after 0.50 s · 3 steps · acceptance length 2.00 over 2 draft steps"
    )


def test_without_drafts_no_acceptance_length_is_claimed():
    report = RunReport()
    report.add(delta(5, is_first=True))
    assert (report.acceptance_length, report.tokens_per_second) == (0.0, 0.0)
    assert "acceptance" not in report.summary()
