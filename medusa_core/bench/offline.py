"""Drives an engine core directly: no HTTP, no other process, so the figures are the engine's own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from medusa_core.bench.prompts import TokenPrompt, seeded
from medusa_core.bench.records import RequestRecord, RunRecord
from medusa_core.engine.core import EngineCore
from medusa_core.outputs import TokenDelta
from medusa_core.params import SamplingParams
from medusa_core.request import EngineRequest

Clock = Callable[[], float]


def run_closed_loop(
    core: EngineCore,
    prompts: Sequence[TokenPrompt],
    params: SamplingParams,
    *,
    variant: str,
    concurrency: int,
    repetition: int = 0,
    seed: int = 0,
    on_finished: Callable[[], object] = lambda: None,
    clock: Clock = time.perf_counter,
) -> RunRecord:
    """Answer every prompt once, `concurrency` at a time, and leave the core idle.

    on_finished: called after each request.
    """
    num_steps = core.stats().num_steps_total
    records: list[RequestRecord] = []
    num_open = 0
    while True:
        while num_open < concurrency and len(records) < len(prompts):
            prompt_idx = len(records)
            prompt = prompts[prompt_idx]
            records.append(
                RequestRecord(
                    prompt_idx=prompt_idx,
                    category=prompt.category,
                    start_s=clock(),
                    num_prompt_tokens=len(prompt.token_ids),
                )
            )
            core.submit(make_request(str(prompt_idx), prompt.token_ids, params, seeded(params, seed, prompt_idx)))
            num_open += 1
        if num_open == 0:
            break
        deltas = core.step()
        now_s = clock()
        for delta in deltas:
            record = records[int(delta.request_id)]
            add_delta(record, delta, now_s)
            if delta.finish_reason is not None:
                num_open -= 1
                on_finished()
    drain(core)
    return RunRecord(
        variant=variant,
        concurrency=concurrency,
        repetition=repetition,
        requests=records,
        num_engine_steps=core.stats().num_steps_total - num_steps,
    )


def make_request(request_id: str, token_ids: list[int], params: SamplingParams, seed: int | None) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=token_ids,
        params=dataclasses.replace(params, seed=seed),
        arrival_s=time.monotonic(),
    )


def add_delta(record: RequestRecord, delta: TokenDelta, now_s: float) -> None:
    """Count one delivery of one request."""
    num_tokens = len(delta.token_ids)
    if num_tokens:
        record.frame_times_s.append(now_s)
        record.frame_num_tokens.append(num_tokens)
        record.num_frames += 1
    record.num_output_tokens += num_tokens
    record.token_ids += delta.token_ids
    if delta.finish_reason is not None:
        record.end_s = now_s
    if delta.num_draft_nodes:
        record.num_draft_steps += 1
        record.num_draft_step_tokens += num_tokens
    elif not delta.is_first:
        record.num_plain_steps += 1
    if not delta.is_first:
        record.num_nodes += delta.num_draft_nodes + 1


def drain(core: EngineCore) -> None:
    """Let steps in flight come back and lanes be left."""
    while core.has_work:
        core.step()
