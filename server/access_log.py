"""The access log's line of one request: who, what, how long, how many tokens, and what speculation did. Never what was said."""

from __future__ import annotations

from typing import Any

from server.generation import Generation
from server.request_info import RequestInfo


class AccessEntry(dict[str, Any]):
    """An event whose keys are those of the JSON log. As text it is a line for people, without what there is nothing to say of."""

    def __str__(self) -> str:
        fields = self.copy()
        fields.pop("message")
        words = [f"{fields.pop(key)}" for key in ("method", "route", "status")]
        words += [f"{fields.pop('duration_ms')} ms", fields.pop("request_id")]
        return " ".join([*words, *(f"{key}={_text(value)}" for key, value in fields.items())])


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def access_entry(info: RequestInfo, *, method: str, route: str, status: int, duration_s: float) -> AccessEntry:
    """method, route, status: from fixed sets. All other text is an id with a checked alphabet or a name that this server gave."""
    entry = AccessEntry(
        message=f"{method} {route} {status}",
        method=method,
        route=route,
        status=status,
        duration_ms=_ms(duration_s),
        request_id=info.request_id,
    )
    error_code = info.error_code
    if info.generation is not None and info.body is not None:
        entry |= {"key": info.key_name, "model": info.body.model, **_generation_fields(info.generation, info.arrival_s)}
        error_code = error_code or info.generation.error_code
    else:
        entry["key"] = info.key_name
    entry |= {"error": error_code, "trace_id": info.trace_id}
    return AccessEntry({key: value for key, value in entry.items() if value is not None})


def _generation_fields(generation: Generation, arrival_s: float) -> dict[str, Any]:
    usage, work = generation.usage, generation.work
    reasons = [reason for reason in generation.finish_reasons if reason is not None]
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.prompt_tokens_details.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        # None for what never ran
        "finish_reasons": reasons or None,
        "drafts": work.num_drafts,
        "accepted_tokens": work.num_accepted_tokens,
        "mean_acceptance_length": work.mean_acceptance_length,
        "ttft_ms": None if work.first_s is None else _ms(work.first_s - arrival_s),
        "queue_ms": None if work.queue_s is None else _ms(work.queue_s),
    }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)
