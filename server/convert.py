"""A validated body to engine requests: prompts in tokens, limits, sampling parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medusa_core.errors import ContextLengthError, InvalidParameterError, PromptError, UnsupportedParameterError
from medusa_core.outputs import EngineInfo
from medusa_core.params import MAX_LOGPROBS, Grammar, SamplingParams
from medusa_core.request import EngineRequest
from medusa_core.text import OutputText
from server.protocol.chat import AssistantMessage, ChatBody, Message
from server.protocol.common import GenerationBody, Speculative
from server.protocol.completions import MAX_PROMPTS, CompletionBody
from server.protocol.tokenization import DetokenizeBody, Detokenized, TokenizeBody, Tokenized
from server.served_model import ServedModel
from server.structured import output_grammar
from server.tools import chat_grammar, offered_tools, template_tools

# Lanes one HTTP request may ask for: n times its prompts.
MAX_CHOICES = MAX_PROMPTS
DEFAULT_COMPLETION_TOKENS = 16
# Of typical acceptance: the default of the reference (FasterDecoding/Medusa, posterior_threshold).
DEFAULT_EPSILON = 0.09


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request in the engine's terms: one engine request per prompt, each of `n` choices."""

    requests: list[EngineRequest]
    n: int

    @property
    def num_choices(self) -> int:
        return len(self.requests) * self.n


def completion_job(body: CompletionBody, model: ServedModel, *, request_id: str, arrival_s: float, cache_salt: str = "") -> Job:
    """Tokenise the prompts of a completion. Raises RequestError; runs on the text thread."""
    _check_common(body)
    _check_best_of(body)
    prompts = _fill_prompts(body, body.suffix, model) if body.suffix else _completion_prompts(body.prompt, model)
    return _job(body, prompts, output_grammar(body), model, request_id, arrival_s, cache_salt)


def chat_job(body: ChatBody, model: ServedModel, *, request_id: str, arrival_s: float, cache_salt: str = "") -> Job:
    """Render the messages of a chat completion. Raises RequestError; runs on the text thread."""
    _check_common(body)
    prompt = _render(body.messages, body, model, offered_tools(body, model))
    return _job(body, [prompt], chat_grammar(body, model), model, request_id, arrival_s, cache_salt)


def tokenized(body: TokenizeBody, model: ServedModel) -> Tokenized:
    """Answer `/tokenize`. Raises RequestError; runs on the text thread."""
    if body.model is not None:
        model.check_name(body.model)
    if body.messages is None:
        assert body.prompt is not None  # the body's own check
        token_ids = model.text.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        if body.add_special_tokens:
            raise UnsupportedParameterError(
                "Chat templates write special tokens themselves; leave add_special_tokens out.", param="add_special_tokens"
            )
        token_ids = _render(body.messages, body, model, template_tools(body.tools, model))
    strings = model.text.token_strings(token_ids) if body.return_token_strs else None
    return Tokenized(count=len(token_ids), max_model_len=model.info.max_model_len, tokens=token_ids, token_strs=strings)


def detokenized(body: DetokenizeBody, model: ServedModel) -> Detokenized:
    """Answer `/detokenize`. Raises RequestError; runs on the text thread."""
    if body.model is not None:
        model.check_name(body.model)
    return Detokenized(model.text.decode(_checked_ids(body.tokens, model.info, "tokens"), skip_special_tokens=False))


def _render(
    messages: Sequence[Message], body: ChatBody | TokenizeBody, model: ServedModel, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    is_continued = bool(body.continue_final_message)
    template_kwargs = body.chat_template_kwargs
    if tools:
        if template_kwargs and "tools" in template_kwargs:
            raise InvalidParameterError(
                "chat_template_kwargs must not set tools beside the field tools.", param="chat_template_kwargs"
            )
        template_kwargs = {**(template_kwargs or {}), "tools": tools}
    return model.text.render_chat(
        [template_message(message) for message in messages],
        add_generation_prompt=not is_continued if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=is_continued,
        template_kwargs=template_kwargs,
    )


def new_output(body: GenerationBody, model: ServedModel, prompt_token_ids: list[int]) -> OutputText:
    """The text of one choice of this body, still empty."""
    ids = frozenset(body.stop_token_ids or ())
    is_continuation = not isinstance(body, ChatBody) or bool(body.continue_final_message)
    tools = (body.tools or ()) if isinstance(body, ChatBody) and body.has_callable_tools else ()
    return model.text.new_output(
        stop=tuple(body.stop),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        stop_token_ids=ids if body.ignore_eos else ids | frozenset(model.info.eos_token_ids),
        prompt_token_ids=prompt_token_ids if is_continuation else (),
        tool_format=model.tool_format if tools else None,
        # An object that response_format asks for is no call, whatever is in it: the grammar gives calls their markers.
        offered_tools=[tool.function.name for tool in tools if body.response_format is None],
        is_single_call=isinstance(body, ChatBody) and body.parallel_tool_calls is False,
        are_calls_held=isinstance(body, ChatBody) and body.has_strict_tools,
    )


def template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: arguments of tool calls as objects."""
    fields = message.model_dump(exclude_none=True)
    if isinstance(message, AssistantMessage):
        for call in fields.get("tool_calls", ()):
            call["function"]["arguments"] = _parse_arguments(call["function"]["arguments"])
    return fields


def _parse_arguments(arguments: str) -> Any:
    """Models write tool arguments as JSON text and templates print them as JSON: text would be quoted twice."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _check_common(body: GenerationBody) -> None:
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        raise InvalidParameterError("top_logprobs is allowed only with logprobs: true.", param="top_logprobs")
    count, field = body.num_logprobs, "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise InvalidParameterError(f"{field} must be between 0 and {MAX_LOGPROBS}, got {count}.", param=field)
    if body.stream_options is not None and not body.stream:
        raise InvalidParameterError("stream_options is allowed only with stream: true.", param="stream_options")


def _check_best_of(body: CompletionBody) -> None:
    n = 1 if body.n is None else body.n
    if body.best_of is None or body.best_of == n:
        return
    if body.best_of < n:
        raise InvalidParameterError(f"best_of ({body.best_of}) must be at least n ({n}).", param="best_of")
    raise UnsupportedParameterError("best_of above n is not supported; leave the field out.", param="best_of")


def _completion_prompts(prompt: Any, model: ServedModel) -> list[list[int]]:
    """The four shapes of `prompt`, already validated, as lists of token ids."""
    if isinstance(prompt, str):
        return [model.text.encode(prompt)]
    if isinstance(prompt[0], int):
        return [_checked_ids(prompt, model.info)]
    if isinstance(prompt[0], str):
        return [model.text.encode(item) for item in prompt]
    return [_checked_ids(item, model.info) for item in prompt]


def _fill_prompts(body: CompletionBody, suffix: str, model: ServedModel) -> list[list[int]]:
    """Prompts that ask for what stands in front of the suffix."""
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not isinstance(texts[0], str):
        raise InvalidParameterError("suffix is allowed only with prompts that are texts, not token ids.", param="suffix")
    if body.num_prompt_logprobs is not None:
        raise UnsupportedParameterError("suffix is not supported together with echo and logprobs.", param="suffix")
    return [model.text.encode_fill(text, suffix) for text in texts]


def _checked_ids(token_ids: list[int], info: EngineInfo, field: str = "prompt") -> list[int]:
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < info.vocab_size):
        return token_ids
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < info.vocab_size:
            raise PromptError(
                f"Token id {_short(token_id)} at position {position} is outside the vocabulary (0 to {info.vocab_size - 1}).",
                param=field,
            )
    return token_ids


def _short(value: int) -> str:
    return str(value) if value.bit_length() <= 128 else "of more than 128 bits"


def _job(
    body: GenerationBody,
    prompts: list[list[int]],
    grammar: Grammar | None,
    model: ServedModel,
    request_id: str,
    arrival_s: float,
    cache_salt: str,
) -> Job:
    n = 1 if body.n is None else body.n
    if len(prompts) * n > MAX_CHOICES:
        message = f"n times the number of prompts must be at most {MAX_CHOICES}, got {n} x {len(prompts)}."
        raise InvalidParameterError(message, param="n")
    prediction = _prediction(body, model)
    requests = [
        EngineRequest(
            request_id=f"{request_id}-{index}",
            prompt_token_ids=prompt,
            params=_sampling_params(body, _max_tokens(body, prompt, model.info), model.info, grammar, prediction),
            priority=body.priority or 0,
            arrival_s=arrival_s,
            cache_salt=cache_salt,
        )
        for index, prompt in enumerate(prompts)
    ]
    return Job(requests, n)


def _max_tokens(body: GenerationBody, prompt: list[int], info: EngineInfo) -> int:
    """What was asked for, or the endpoint's default as far as it fits. Raises ContextLengthError when it does not fit."""
    is_chat = isinstance(body, ChatBody)
    asked = body.max_completion_tokens or body.max_tokens if isinstance(body, ChatBody) else body.max_tokens
    prompt_field = "messages" if is_chat else "prompt"
    if not prompt:
        raise PromptError("The prompt is empty.", hint="Send at least one token.", param=prompt_field)
    room = info.max_model_len - len(prompt)
    if room < (1 if asked is None else asked):
        and_asked = f" and {asked} tokens were asked for" if asked else ""
        raise ContextLengthError(
            f"This model's maximum context length is {info.max_model_len} tokens; the prompt has {len(prompt)}{and_asked}.",
            hint="Shorten the prompt or ask for fewer tokens.",
            param=prompt_field,
        )
    return (room if is_chat else min(room, DEFAULT_COMPLETION_TOKENS)) if asked is None else asked


def _prediction(body: GenerationBody, model: ServedModel) -> tuple[int, ...]:
    """What the output may be, as far as there is room for it."""
    if not isinstance(body, ChatBody) or body.prediction is None:
        return ()
    content = body.prediction.content
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return tuple(model.text.encode(text, add_special_tokens=False)[: model.info.max_model_len])


def _sampling_params(
    body: GenerationBody, max_tokens: int, info: EngineInfo, grammar: Grammar | None, prediction: tuple[int, ...]
) -> SamplingParams:
    """Null and absent fields take `SamplingParams`' defaults, which are the API's. Raises InvalidParameterError."""
    stop_token_ids = body.stop_token_ids or []
    for field, token_ids in (("stop_token_ids", stop_token_ids), ("logit_bias", body.logit_bias)):
        for token_id in token_ids:
            if not 0 <= token_id < info.vocab_size:
                message = f"{field}: {token_id} is outside the vocabulary (0 to {info.vocab_size - 1})."
                raise InvalidParameterError(message, param=field)
    penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty")
    names = ("temperature", "top_p", "top_k", "min_p", *penalties, "seed", "min_tokens", "ignore_eos", "n")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(body, name)) is not None}
    # Other servers write "off" as -1.
    if given.get("top_k") == -1:
        given["top_k"] = 0
    return SamplingParams(
        **given,
        max_tokens=max_tokens,
        stop_token_ids=tuple(stop_token_ids),
        logit_bias=tuple(body.logit_bias.items()),
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.num_prompt_logprobs,
        grammar=grammar,
        prediction=prediction,
        **_speculation(body.speculative or Speculative()),
    )


def _speculation(speculative: Speculative) -> dict[str, Any]:
    if speculative.acceptance == "exact":
        for name in ("epsilon", "delta"):
            if getattr(speculative, name) is not None:
                message = f'speculative.{name} is for acceptance "typical"; leave it out.'
                raise InvalidParameterError(message, param=f"speculative.{name}")
        return {"is_speculation_enabled": speculative.enabled, "max_nodes": speculative.max_nodes}
    epsilon = DEFAULT_EPSILON if speculative.epsilon is None else speculative.epsilon
    for name, value in (("epsilon", epsilon), ("delta", speculative.delta)):
        if value is not None and not 0.0 < value <= 1.0:
            message = f"speculative.{name} must be above 0 and at most 1, got {value}."
            raise InvalidParameterError(message, param=f"speculative.{name}")
    delta = math.sqrt(epsilon) if speculative.delta is None else speculative.delta
    return {
        "is_speculation_enabled": speculative.enabled,
        "max_nodes": speculative.max_nodes,
        "typical_acceptance": (epsilon, delta),
    }
