"""Runs requests through an assembled engine and collects what each choice emitted."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field

from medusa_core.config import CacheConfig, EngineConfig, ExecutionConfig, SchedulerConfig, SpeculationConfig
from medusa_core.engine.build import CalibratedHeads, assemble_engine
from medusa_core.engine.core import EngineCore
from medusa_core.model.loader import LoadedModel
from medusa_core.model.projection import build_projection
from medusa_core.outputs import FinishReason, TokenLogprob
from medusa_core.params import SamplingParams
from medusa_core.request import EngineRequest


@dataclass
class Output:
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_accepted: int = 0
    num_draft_steps: int = 0


def make_engine(loaded: LoadedModel, heads: CalibratedHeads | None, **options: object) -> EngineCore:
    """options: fields of CacheConfig, SchedulerConfig, SpeculationConfig and ExecutionConfig, told apart by name. Without heads the
    engine is the plain one that others are compared with, unless they say otherwise."""

    def pick(cls: type) -> dict[str, object]:
        return {name: value for name, value in options.items() if name in cls.__dataclass_fields__}

    cache = CacheConfig(**{"num_blocks": 400, "block_size": 8, **pick(CacheConfig)})
    scheduler = SchedulerConfig(**{"max_num_seqs": 8, "max_step_rows": 512, **pick(SchedulerConfig)})
    speculation = SpeculationConfig(**{"tree_size": 16, "prompt_lookup": heads is not None, **pick(SpeculationConfig)})
    execution = ExecutionConfig(**pick(ExecutionConfig))
    if execution.mode != "eager" and (execution.mode == "captured" or loaded.device.type == "cuda"):
        loaded = with_own_weights(loaded)  # they will be fused
    return assemble_engine(
        EngineConfig(cache=cache, scheduler=scheduler, speculation=speculation, execution=execution), loaded, heads
    )


def with_own_weights(loaded: LoadedModel) -> LoadedModel:
    model = copy.deepcopy(loaded.model)
    return dataclasses.replace(loaded, model=model, project=build_projection(model))


def run(
    core: EngineCore, requests: list[tuple[list[int], SamplingParams]], *, arrive_every: int = 0
) -> dict[tuple[int, int], Output]:
    """Outputs by (request number, choice). `arrive_every`: steps between arrivals; 0 submits all at once."""
    outputs: dict[tuple[int, int], Output] = {}
    waiting = [
        EngineRequest(request_id=str(number), prompt_token_ids=prompt, params=params)
        for number, (prompt, params) in enumerate(requests)
    ]
    step = 0
    while waiting or core.has_work:
        while waiting and step >= arrive_every * (len(requests) - len(waiting)):
            core.submit(waiting.pop(0))
        for delta in core.step():
            output = outputs.setdefault((int(delta.request_id), delta.choice_idx), Output())
            output.token_ids += delta.token_ids
            output.logprobs += delta.logprobs
            output.prompt_logprobs += delta.prompt_logprobs
            output.num_accepted += delta.num_accepted
            output.num_draft_steps += delta.num_draft_nodes > 0
            if delta.finish_reason is not None:
                assert output.finish_reason is None
                output.finish_reason = delta.finish_reason
        step += 1
    assert core.stats().num_blocks_used == 0, "blocks leak"
    return outputs
