"""A scripted engine client and a tokenizer of one token per character, with the project's real stop and detokenising code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from medusa_core.errors import ConfigError, EngineDeadError, EngineNotReadyError, InvalidParameterError, MedusaError
from medusa_core.outputs import EngineInfo, EngineStats, FinishReason, TokenDelta, TokenLogprob
from medusa_core.request import EngineRequest
from medusa_core.text.detokenizer import Detokenizer
from medusa_core.text.processor import OutputText
from medusa_core.text.stop_strings import StopMatcher

EOS = 0
VOCAB_SIZE = 1000
MAX_DEPTH = 3
INFO = EngineInfo(
    model_name="tiny",
    tokenizer_path="/nowhere",
    dtype="float32",
    device="cpu",
    max_model_len=256,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=[EOS],
    num_blocks=100,
    block_size=16,
    max_num_seqs=8,
    num_heads=MAX_DEPTH,
    max_depth=MAX_DEPTH,
    tree="test",
    tree_size="16",
)


def decode(token_ids: Sequence[int]) -> str:
    return "".join(chr(token_id) for token_id in token_ids if token_id != EOS)


class FakeText:
    """Token id = code point. A chat is rendered as `role:content|` per message."""

    def encode(self, text, *, add_special_tokens=True):
        return [ord(character) for character in text]

    def encode_fill(self, prefix, suffix):
        return self.encode(f"<{prefix}|{suffix}>")

    def decode(self, token_ids, *, skip_special_tokens=True):
        return decode(token_ids) if skip_special_tokens else "".join(map(chr, token_ids))

    def token_strings(self, token_ids):
        return [f"<{chr(token_id)}>" for token_id in token_ids]

    def token_bytes(self, token_id):
        return chr(token_id).encode() if token_id != EOS else b"</s>"

    def added_tokens(self):
        return {}

    def tokenizer_info(self):
        return {"tokenizer_class": "FakeText", "eos_token": "</s>"}

    chat_template_text = "{{ tools }} <tool_call> arguments"

    def render_chat(self, messages, *, add_generation_prompt=True, continue_final_message=False, template_kwargs=None):
        if add_generation_prompt and continue_final_message:
            raise InvalidParameterError("Both at once.", param="continue_final_message")
        self.last_messages = messages
        self.last_kwargs = template_kwargs
        text = "|".join(f"{message['role']}:{message.get('content', '')}" for message in messages)
        return self.encode(text + ("|" if add_generation_prompt else ""))

    def new_output(
        self,
        *,
        stop=(),
        include_stop_str_in_output=False,
        skip_special_tokens=True,
        stop_token_ids=frozenset(),
        prompt_token_ids=(),
        tool_format=None,
        offered_tools=(),
        is_single_call=False,
        are_calls_held=False,
    ):
        detokenizer = Detokenizer(decode, byte_values={}, prompt_token_ids=prompt_token_ids)
        parser = tool_format and tool_format.new_parser(offered=offered_tools, is_single=is_single_call, is_held=are_calls_held)
        return OutputText(detokenizer, StopMatcher(stop, is_included=include_stop_str_in_output), stop_token_ids, parser)


def text_loader(settings):
    """For front ends in processes of their own. The template "broken" cannot be loaded, "bug" neither."""

    def load(info):
        if settings.chat_template == "broken":
            raise ConfigError("--chat-template is broken.", hint="Mend it.")
        if settings.chat_template == "bug":
            raise ZeroDivisionError
        return FakeText()

    return load


def answer_of(request: EngineRequest, choice_idx: int) -> str:
    """What the engine says when no script is given: differs by choice."""
    return f"Hello world {choice_idx}"


@dataclass
class FakeClient:
    """Emits `answer(request, choice)` and EOS: one token, then drafts of depth 3 of which two are accepted and a bonus follows.

    gate: if set, the engine waits for it after `num_free_steps` steps. failure: raised after as many steps.
    batch_size: deltas that the reader finds at a time.
    """

    answer: Callable[[EngineRequest, int], str] = answer_of
    refusal: MedusaError | None = None
    failure: MedusaError | None = None
    load_error: MedusaError | None = None
    gate: asyncio.Event | None = None
    num_free_steps: int = 0
    step_s: float = 0.0
    batch_size: int = 1
    loading: asyncio.Event | None = None
    is_alive: bool = True
    stats: EngineStats = field(default_factory=EngineStats)
    description: EngineInfo = INFO
    requests: list[EngineRequest] = field(default_factory=list)
    deltas: list[TokenDelta] = field(default_factory=list)
    aborted: list[tuple[str, int | None]] = field(default_factory=list)
    num_live: int = 0
    is_started: bool = False
    is_closed: bool = False

    async def start(self) -> EngineInfo:
        if self.loading is not None:
            await self.loading.wait()
        if self.load_error is not None:
            raise self.load_error
        self.is_started = True
        return self.description

    async def close(self) -> None:
        self.is_closed = True

    @property
    def info(self) -> EngineInfo:
        if not self.is_started:
            raise EngineNotReadyError("Loading.")
        return self.description

    @property
    def num_open_requests(self) -> int:
        return self.num_live

    @property
    def is_ready(self) -> bool:
        return self.is_started and self.is_alive

    async def abort(self, request_id: str, choice_idx: int | None = None) -> None:
        self.aborted.append((request_id, choice_idx))

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        self.num_live += 1
        finished = False
        try:
            async for delta in self._steps(request):
                self.deltas.append(delta)
                yield delta
            finished = True
        finally:
            self.num_live -= 1
            if not finished:
                self.aborted.append((request.request_id, None))

    async def generate_many(self, requests: Sequence[EngineRequest]) -> AsyncIterator[list[TokenDelta]]:
        """The requests' deltas in turn, `batch_size` at a time, and what is left when one fails."""
        batch: list[TokenDelta] = []
        async with aclosing(_merge([self.generate(request) for request in requests])) as deltas:
            try:
                async for delta in deltas:
                    batch.append(delta)
                    if len(batch) == self.batch_size:
                        yield batch
                        batch = []
            except Exception:
                if batch:
                    yield batch
                raise
        if batch:
            yield batch

    async def _steps(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        limit = request.params.max_tokens
        left = {}
        for choice_idx in range(request.params.n):
            text = self.answer(request, choice_idx)
            left[choice_idx] = ([ord(character) for character in text] + [EOS])[:limit]
        num_steps = 0
        # Last choice first: nothing promises callers an order.
        while left:
            await self._pause(num_steps)
            for choice_idx in sorted(left, reverse=True):
                delta = self._delta(request, choice_idx, left[choice_idx], is_first=num_steps == 0)
                yield delta
                left[choice_idx] = left[choice_idx][len(delta.token_ids) :]
                if delta.finish_reason is not None:
                    del left[choice_idx]
            num_steps += 1

    async def _pause(self, num_steps: int) -> None:
        await asyncio.sleep(self.step_s)
        if num_steps < self.num_free_steps:
            return
        if self.failure is not None:
            raise self.failure
        if self.gate is not None:
            await self.gate.wait()
        if not self.is_alive:
            raise EngineDeadError("The worker died.")

    def _delta(self, request: EngineRequest, choice_idx: int, left: list[int], *, is_first: bool) -> TokenDelta:
        tokens = left[:1] if is_first else left[:3]
        reason = None
        if (request.request_id, choice_idx) in self.aborted:
            tokens, reason = [], FinishReason.ABORT
        elif len(tokens) == len(left):
            reason = FinishReason.STOP if tokens[-1:] == [EOS] else FinishReason.LENGTH
        has_draft = not is_first and bool(tokens) and request.params.is_speculation_enabled
        return TokenDelta(
            request_id=request.request_id,
            choice_idx=choice_idx,
            token_ids=tokens,
            finish_reason=reason,
            num_draft_nodes=15 if has_draft else 0,
            draft_depth=MAX_DEPTH if has_draft else 0,
            num_accepted=min(2, len(tokens)) if has_draft else 0,
            is_first=is_first,
            num_cached_tokens=2 if is_first else 0,
            queue_s=0.01 if is_first else 0.0,
            logprobs=_logprobs(tokens, request.params.num_logprobs),
            prompt_logprobs=_logprobs(request.prompt_token_ids[1:], request.params.num_prompt_logprobs) if is_first else [],
        )


def _logprobs(token_ids: Sequence[int], num_top: int | None) -> list[TokenLogprob]:
    """-1/4 of its id for each token; the most likely ones are 65, 66, ... at -0.5 each."""
    if num_top is None:
        return []
    return [TokenLogprob(-token_id / 4, list(range(65, 65 + num_top)), [-0.5] * num_top) for token_id in token_ids]


async def _merge(streams):
    """Items of all streams as they come. The first stream that fails ends the rest and its error is raised."""
    queue = asyncio.Queue()

    async def pump(stream):
        async for item in stream:
            queue.put_nowait((item,))

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    num_open = len(tasks)
    try:
        while num_open:
            item = await queue.get()
            if isinstance(item, tuple):
                yield item[0]
            else:
                num_open -= 1
                item.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
