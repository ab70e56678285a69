"""A grammar that takes too much to follow is the client's to mend: no server error, and nothing to try again."""

from __future__ import annotations

import json

from medusa_core.outputs import FinishReason, TokenDelta
from tests.server.fakes import FakeClient

BODY = {"model": "tiny", "prompt": "Hi", "structured_outputs": {"regex": "H.*"}}


class GivesUp(FakeClient):
    """Behind the first token."""

    async def _steps(self, request):
        yield TokenDelta(request_id=request.request_id, choice_idx=0, token_ids=[72], is_first=True)
        yield TokenDelta(request_id=request.request_id, choice_idx=0, token_ids=[], finish_reason=FinishReason.GRAMMAR)


async def test_the_answer_names_the_field(make_http):
    response = await (await make_http(GivesUp())).post("/v1/completions", json=BODY)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "structured_outputs.regex")
    assert "Simplify" in error["message"]


async def test_a_stream_ends_with_it(make_http):
    response = await (await make_http(GivesUp())).post("/v1/completions", json={**BODY, "stream": True})
    *_, last, done, _ = response.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["param"] == "structured_outputs.regex"
    assert done == "data: [DONE]"
