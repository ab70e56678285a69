"""Mixed traffic against a server, and the client's own count of it."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.server_process import MODEL, REQUEST_TIMEOUT_S

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
# The server's name for paths that it does not know.
UNMATCHED = "unmatched"
LONG_STREAM_S = 20
# What a server of 2,048 tokens leaves beside a short prompt.
MAX_STREAM_TOKENS = 1900
CROWD = 16
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
    "required": ["city", "size"],
}
PREAMBLE = "You are a careful assistant who answers in few words. " * 8
# A body, and the status and code of the refusal. The paths are in `bad_input`.
BAD_COMPLETIONS: tuple[tuple[dict[str, Any], int, str], ...] = (
    ({"prompt": "Hi", "temperature": -1}, 400, "invalid_value"),
    ({"prompt": "Hi", "temprature": 1}, 400, "unknown_parameter"),
    ({"prompt": "Hi", "best_of": 3}, 400, "unsupported_parameter"),
    ({"prompt": "word " * 3000}, 400, "context_length_exceeded"),
    ({"prompt": "Hi", "structured_outputs": {"regex": "("}}, 400, "invalid_value"),
    ({"prompt": "Hi", "model": "gpt-4"}, 404, "model_not_found"),
)


@dataclass
class Ledger:
    """What clients were told, and what they did. `add` and the other methods may be called from any thread.

    answers: by route and status. refusals: by code. ended: choices by finish_reason. prompt_tokens, cached_tokens,
    completion_tokens: of usage. left: choices whose client went. left_tokens: tokens that had come by then. stream_seconds: of each
    stream read to its end. surprises: what should not be.
    """

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    left: int = 0
    left_tokens: int = 0
    stream_seconds: list[float] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, route: str, body: dict[str, Any]) -> None:
        """An answer with its choices and usage."""
        usage = body["usage"]
        with self._lock:
            self.answers[route, 200] += 1
            self.prompt_tokens += usage["prompt_tokens"]
            self.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
            self.completion_tokens += usage["completion_tokens"]
            self.ended.update(choice["finish_reason"] for choice in body["choices"])

    def add_refusal(self, route: str, response: httpx.Response) -> None:
        code = response.json()["error"]["code"]
        with self._lock:
            self.answers[route, response.status_code] += 1
            # Where there is no such path, nothing is refused.
            if code != "not_found":
                self.refusals[code] += 1

    def add_left(self, route: str, status: int, *, choices: int, tokens: int) -> None:
        with self._lock:
            self.answers[route, status] += 1
            self.left += choices
            self.left_tokens += tokens

    def add_stream(self, seconds: float) -> None:
        with self._lock:
            self.stream_seconds.append(seconds)

    def add_surprise(self, text: str) -> None:
        with self._lock:
            self.surprises.append(text)


class Client:
    """One client of the server, for one thread. key: its API key."""

    def __init__(self, url: str, key: str, ledger: Ledger) -> None:
        headers = {"authorization": f"Bearer {key}"}
        self.http = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False, headers=headers)
        self.ledger = ledger

    def ask(self, route: str, **body: Any) -> None:
        """A whole answer, or a refusal because the server is full."""
        response = self.http.post(route, json={"model": MODEL, **body})
        if response.status_code == 200:
            self.ledger.add(route, response.json())
        else:
            self._take_refusal(route, response, status=503)

    def read(self, route: str, **body: Any) -> float | None:
        """A stream to its end; its seconds, or None for a refusal."""
        started_s = time.monotonic()
        body = {"model": MODEL, **body, "stream": True, "stream_options": {"include_usage": True}}
        with self.http.stream("POST", route, json=body) as response:
            if response.status_code != 200:
                response.read()
                self._take_refusal(route, response, status=503)
                return None
            lines = [line for line in response.iter_lines() if line]
        *chunks, last = [line.removeprefix("data: ") for line in lines]
        if last != "[DONE]":
            self.ledger.add_surprise(f"a stream ended with {last}")
            return None
        found = [json.loads(chunk) for chunk in chunks]
        ends = [choice for chunk in found for choice in chunk["choices"] if choice["finish_reason"]]
        self.ledger.add(route, {"usage": found[-1]["usage"], "choices": ends})
        seconds = time.monotonic() - started_s
        self.ledger.add_stream(seconds)
        return seconds

    def leave(self, *, prompt: str, n: int, num_frames: int) -> None:
        """Read some of a stream, and go."""
        body = {"model": MODEL, "prompt": prompt, "n": n, "max_tokens": 800, "ignore_eos": True, "stream": True}
        num_tokens = 0
        with self.http.stream("POST", COMPLETIONS, json={**body, "return_token_ids": True}) as response:
            if response.status_code != 200:
                response.read()
                self._take_refusal(COMPLETIONS, response, status=503)
                return
            frames = (line for line in response.iter_lines() if line)
            for _ in range(num_frames):
                chunk = json.loads(next(frames).removeprefix("data: "))
                num_tokens += sum(len(choice["token_ids"]) for choice in chunk["choices"])
        self.ledger.add_left(COMPLETIONS, 200, choices=n, tokens=num_tokens)

    def hang_up(self, *, prompt: str) -> None:
        """Ask for a whole answer, and go before it comes."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 800, "ignore_eos": True}
        try:
            response = self.http.post(COMPLETIONS, json=body, timeout=1.5)
        except httpx.ReadTimeout:
            # nginx's status, which the server uses too: nobody was left to read an answer
            self.ledger.add_left(COMPLETIONS, 499, choices=1, tokens=0)
        else:
            self._take_refusal(COMPLETIONS, response, status=503)

    def blunder(self, route: str, *, status: int, code: str, label: str | None = None, **request: Any) -> None:
        """Something that is refused with `status` and `code`. label: the server's name for the route, if it is another."""
        response = self.http.request(request.pop("method", "POST"), route, **request)
        self._take_refusal(label or route, response, status=status, code=code)

    def _take_refusal(self, label: str, response: httpx.Response, *, status: int, code: str = "server_overloaded") -> None:
        self.ledger.add_refusal(label, response)
        if (response.status_code, response.json()["error"]["code"]) != (status, code):
            self.ledger.add_surprise(f"{label}, instead of {status} {code}: {response.status_code} {response.text}")


class Traffic:
    """Clients of a server, counted in `ledger`. What they asked for has been answered when a method returns."""

    def __init__(self, url: str, key: str) -> None:
        self.ledger = Ledger()
        self._url, self._key = url, key
        self._deadline_s = 0.0

    def run_alone(self, seconds: float) -> None:
        """One client, one request at a time, which is when speculation pays most."""
        self._deadline_s = time.monotonic() + seconds
        self._act(self.code, seed=0)

    def run_mixed(self, seconds: float) -> None:
        """Clients of all other kinds at once."""
        self._deadline_s = time.monotonic() + seconds
        actors = (self.long_stories, self.long_chats, self.questions, self.questions, self.leavers, self.bad_input, self.crowds)
        with ThreadPoolExecutor(len(actors)) as pool:
            for ended in [pool.submit(self._act, actor, seed) for seed, actor in enumerate(actors, start=1)]:
                ended.result()

    def client(self) -> Client:
        return Client(self._url, self._key, self.ledger)

    def _act(self, actor: Callable[[Client, random.Random], None], seed: int) -> None:
        client, chance = self.client(), random.Random(seed)
        while self._left_s > 0:
            actor(client, chance)
            time.sleep(chance.uniform(0.1, 0.5))

    @property
    def _left_s(self) -> float:
        return self._deadline_s - time.monotonic()

    def code(self, client: Client, chance: random.Random) -> None:
        """What the demo model's heads were made for."""
        prompt = f"# Exercise {chance.randrange(99)}: a class for a stack, with tests\nclass Stack:\n"
        client.ask(COMPLETIONS, prompt=prompt, max_tokens=100, temperature=0)

    def long_stories(self, client: Client, chance: random.Random) -> None:
        self._long(client, COMPLETIONS, prompt=f"Chapter {chance.randrange(99)}. Once upon a time")

    def long_chats(self, client: Client, chance: random.Random) -> None:
        messages = [{"role": "system", "content": PREAMBLE}, {"role": "user", "content": f"Count from {chance.randrange(99)} on."}]
        self._long(client, CHAT, messages=messages)

    def _long(self, client: Client, route: str, **body: Any) -> None:
        """Streams of 20 seconds and more: longer each time, until they take that long on this machine."""
        num_tokens = 160
        while self._left_s > LONG_STREAM_S:
            seconds = client.read(route, **body, max_tokens=num_tokens, ignore_eos=True, temperature=0.7, seed=num_tokens)
            if seconds is not None and seconds < 1.2 * LONG_STREAM_S:
                num_tokens = min(MAX_STREAM_TOKENS, int(num_tokens * 1.3 * LONG_STREAM_S / seconds))
            time.sleep(0.2)

    def questions(self, client: Client, chance: random.Random) -> None:
        """Short answers of every kind."""
        chat = [{"role": "system", "content": PREAMBLE}, {"role": "user", "content": "Name a city of Italy."}]
        schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
        kinds: tuple[Callable[[], object], ...] = (
            lambda: client.ask(COMPLETIONS, prompt="def fibonacci(n):\n", max_tokens=40, temperature=0),
            lambda: client.ask(COMPLETIONS, prompt="1, 2, 3, 4, 5, 6,", max_tokens=40, temperature=0, stop="9"),
            lambda: client.ask(COMPLETIONS, prompt=["The sea", "The sun"], n=2, max_tokens=8),
            lambda: client.ask(CHAT, messages=chat, max_tokens=24, n=3),
            lambda: client.ask(CHAT, messages=chat, max_tokens=60, response_format=schema),
            lambda: client.read(CHAT, messages=chat, max_tokens=60, response_format=schema),
            lambda: client.read(COMPLETIONS, prompt="One, two, three,", max_tokens=30, stop=["six", "\n"], temperature=0),
            lambda: client.ask(COMPLETIONS, prompt="A list:", max_tokens=20, presence_penalty=1, logit_bias={"11": -5}),
            lambda: client.ask(COMPLETIONS, prompt="Hello", max_tokens=16, speculative={"enabled": False}),
            lambda: client.ask(COMPLETIONS, prompt="Hello", max_tokens=1),
        )
        chance.choice(kinds)()

    def leavers(self, client: Client, chance: random.Random) -> None:
        prompt = f"Story number {chance.randrange(99)}:"
        if chance.random() < 0.3:
            client.hang_up(prompt=prompt)
        else:
            client.leave(prompt=prompt, n=chance.randint(1, 2), num_frames=chance.randint(1, 12))
        time.sleep(chance.uniform(1, 4))

    def bad_input(self, client: Client, chance: random.Random) -> None:
        for body, status, code in BAD_COMPLETIONS:
            client.blunder(COMPLETIONS, status=status, code=code, json={"model": MODEL, **body})
            time.sleep(chance.uniform(0, 0.5))
        client.blunder(COMPLETIONS, status=400, code="invalid_json", content=b"{")
        client.blunder(CHAT, status=400, code="invalid_value", json={"model": MODEL, "messages": []})
        client.blunder("/v1/embeddings", status=404, code="not_found", label=UNMATCHED, json={"model": MODEL, "input": "Hi"})
        wrong = {"authorization": "Bearer wrong"}
        client.blunder(COMPLETIONS, status=401, code="invalid_api_key", headers=wrong, json={"prompt": "Hi"})
        client.blunder(COMPLETIONS, status=413, code="request_too_large", content=b" " * 3_000_000)
        time.sleep(chance.uniform(2, 5))

    def crowds(self, client: Client, chance: random.Random) -> None:
        """More at once than may run and wait."""
        question = {"prompt": "Yes or no?", "max_tokens": 4}
        with ThreadPoolExecutor(CROWD) as pool:
            for ended in [pool.submit(self.client().ask, COMPLETIONS, **question) for _ in range(CROWD)]:
                ended.result()
        time.sleep(min(max(self._left_s, 0), chance.uniform(15, 25)))
