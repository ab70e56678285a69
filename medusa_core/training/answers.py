"""Texts that a model writes itself: what heads are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from medusa_core.engine.core import EngineCore
from medusa_core.errors import ConfigError
from medusa_core.outputs import FinishReason
from medusa_core.params import SamplingParams
from medusa_core.request import EngineRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """output_token_ids: with the token that ended it, unless its length did. category: of the prompt, for tables."""

    prompt_token_ids: list[int]
    output_token_ids: list[int]
    category: str


def answer_prompts(
    core: EngineCore, prompts: Sequence[tuple[str, list[int]]], params: SamplingParams, *, progress: bool
) -> list[Answer]:
    """An answer to each prompt (category, token ids), in their order. Leaves the core idle.

    Raises ConfigError, before anything runs, for a prompt whose answer may not fit the context.
    """
    limit = core.info.max_model_len - (params.max_tokens or 1)
    for number, (_, token_ids) in enumerate(prompts, start=1):
        if len(token_ids) > limit:
            raise ConfigError(
                f"Prompt {number} has {len(token_ids)} tokens; with {params.max_tokens} of output it exceeds the context of "
                f"{core.info.max_model_len}.",
                hint="Lower --max-tokens, or raise --max-model-len.",
            )
    outputs = run_prompts(core, [token_ids for _, token_ids in prompts], [params] * len(prompts), progress=progress)
    return [
        Answer(prompt_token_ids=token_ids, output_token_ids=output_ids, category=category)
        for (category, token_ids), (output_ids, _) in zip(prompts, outputs, strict=True)
    ]


def run_prompts(
    core: EngineCore, prompts: Sequence[list[int]], params: Sequence[SamplingParams], *, progress: bool = False
) -> list[tuple[list[int], FinishReason]]:
    """What follows each prompt, and how it ended; as many at once as the engine has lanes. Leaves the core idle."""
    outputs: list[list[int]] = [[] for _ in prompts]
    reasons = [FinishReason.LENGTH] * len(prompts)
    num_submitted = num_open = 0
    with tqdm(total=len(prompts), desc="answering", unit="prompt", disable=not progress) as bar:
        while num_open or num_submitted < len(prompts):
            while num_open < core.info.max_num_seqs and num_submitted < len(prompts):
                core.submit(
                    EngineRequest(
                        request_id=str(num_submitted), prompt_token_ids=prompts[num_submitted], params=params[num_submitted]
                    )
                )
                num_submitted += 1
                num_open += 1
            for delta in core.step():
                outputs[int(delta.request_id)] += delta.token_ids
                if delta.finish_reason is not None:
                    reasons[int(delta.request_id)] = delta.finish_reason
                    num_open -= 1
                    bar.update()
    while core.has_work:
        core.step()
    return list(zip(outputs, reasons, strict=True))
