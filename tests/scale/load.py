"""Clients that keep asking, some of them for streams, count what they met, and send a request again after what may be retried."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from tests.scale.processes import STEADY

# What an OpenAI client retries by itself, and a connection that ends before the answer does.
RETRIABLE = frozenset({408, 409, 429, 500, 502, 503, 504})
MAX_ATTEMPTS = 4
RETRY_AFTER_S = 0.25


@dataclass
class Outcome:
    """attempts: by what each ended with: `ok`, a status, `cut` (an answer that stopped half-way) or `refused` (no connection).

    num_retried: requests sent more than once. lost: those that failed for good, with the reason. wrong: answers that are not the
    expected ones. trouble_s: when attempts failed, in seconds since the load began. longest_s: of a request, its retries included.
    """

    attempts: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    num_retried: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    trouble_s: list[float] = field(default_factory=list)
    longest_s: float = 0.0


def answers_alone(url: str, *, num_clients: int, num_tokens: int) -> dict[str, str]:
    """What one server answers to a prompt per client: text by prompt."""
    texts = {}
    for number in range(num_clients):
        prompt = f"{number} times {STEADY['prompt']}"
        body = {**STEADY, "prompt": prompt, "max_tokens": num_tokens}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)
        texts[prompt] = response.json()["choices"][0]["text"]
    return texts


class Load:
    """A client for each of `texts`, from `async with` on until its end, which waits for the requests in progress.

    texts: the answers that are expected, by prompt. streamed: whether clients ask for a stream, in turn.
    """

    def __init__(self, url: str, *, texts: dict[str, str], num_tokens: int, streamed: tuple[bool, ...] = (True, False)) -> None:
        self.outcome = Outcome()
        self._url = url
        self._texts = texts
        self._num_tokens = num_tokens
        self._streamed = streamed
        self._is_ending = False

    async def __aenter__(self) -> Load:
        self._http = httpx.AsyncClient(base_url=self._url, timeout=60, trust_env=False, limits=httpx.Limits(max_connections=None))
        self._start = time.monotonic()
        self._tasks = [
            asyncio.create_task(self._client(prompt, is_streamed=is_streamed))
            for prompt, is_streamed in zip(self._texts, itertools.cycle(self._streamed), strict=False)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_ending = True
        await asyncio.gather(*self._tasks)
        await self._http.aclose()

    async def _client(self, prompt: str, *, is_streamed: bool) -> None:
        while not self._is_ending:
            await self._request(prompt, is_streamed=is_streamed)

    async def _request(self, prompt: str, *, is_streamed: bool) -> None:
        body = {**STEADY, "prompt": prompt, "max_tokens": self._num_tokens, "stream": is_streamed}
        self.outcome.num_requests += 1
        begin = time.monotonic()
        for attempt in range(MAX_ATTEMPTS):
            kind, text = await self._attempt(body)
            self.outcome.attempts[kind] += 1
            if kind == "ok":
                self.outcome.longest_s = max(self.outcome.longest_s, time.monotonic() - begin)
                if text != self._texts[prompt]:
                    self.outcome.wrong.append(text)
                return
            self.outcome.trouble_s.append(time.monotonic() - self._start)
            if kind.isdecimal() and int(kind) not in RETRIABLE:
                break
            self.outcome.num_retried += attempt == 0
            await asyncio.sleep(RETRY_AFTER_S * 2**attempt)
        self.outcome.lost.append(f"{kind}: {text[:300]}")

    async def _attempt(self, body: dict[str, Any]) -> tuple[str, str]:
        try:
            if body["stream"]:
                return await self._stream(body)
            response = await self._http.post("/v1/completions", json=body)
            if response.status_code != 200:
                return str(response.status_code), response.text
            return "ok", response.json()["choices"][0]["text"]
        except httpx.ConnectError as error:
            return "refused", repr(error)
        except httpx.TransportError as error:
            return "cut", repr(error)

    async def _stream(self, body: dict[str, Any]) -> tuple[str, str]:
        pieces = []
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                return str(response.status_code), (await response.aread()).decode()
            last = ""
            async for line in response.aiter_lines():
                if line:
                    last = line
                    if line != "data: [DONE]":
                        pieces.append(msgspec.json.decode(line.removeprefix("data: ")))
        if last != "data: [DONE]":
            return "cut", last
        # A frame may be an error: the engine's process died, and its server lives.
        if errors := [piece["error"] for piece in pieces if "error" in piece]:
            return "cut", str(errors)
        return "ok", "".join(piece["choices"][0]["text"] for piece in pieces)
