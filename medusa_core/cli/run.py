"""One prompt through an engine, with the figures that describe the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from medusa_core.config import EngineConfig
from medusa_core.engine.build import build_engine
from medusa_core.engine.in_process import InProcessClient
from medusa_core.outputs import EngineInfo, FinishReason, TokenDelta
from medusa_core.params import SamplingParams
from medusa_core.request import EngineRequest
from medusa_core.text.processor import TextProcessor


@dataclass(slots=True)
class RunReport:
    """What a run emitted, and how fast.

    Steps emit tokens after the first one, which comes from the prompt's last chunk. A draft step offered a tree; acceptance length
    is tokens per draft step, bonus included. Seconds exclude loading.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_steps: int = 0
    num_draft_steps: int = 0
    num_draft_step_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.total_s if self.total_s else 0.0

    @property
    def acceptance_length(self) -> float:
        return self.num_draft_step_tokens / self.num_draft_steps if self.num_draft_steps else 0.0

    def add(self, delta: TokenDelta) -> None:
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason or self.finish_reason
        if not delta.is_first:
            self.num_steps += 1
        if delta.num_draft_nodes:
            self.num_draft_steps += 1
            self.num_draft_step_tokens += len(delta.token_ids)

    def summary(self) -> str:
        parts = [
            f"{len(self.token_ids)} tokens in {self.total_s:.2f} s",
            f"{self.tokens_per_second:.1f} tokens/s",
            f"first token after {self.first_token_s:.2f} s",
            f"{self.num_steps} steps",
        ]
        if self.num_draft_steps:
            parts.append(f"acceptance length {self.acceptance_length:.2f} over {self.num_draft_steps} draft steps")
        return " · ".join(parts)


async def run_prompt(
    config: EngineConfig, prompt: str, params: SamplingParams, *, is_raw: bool, write: Callable[[str], None]
) -> tuple[RunReport, list[int], EngineInfo]:
    """Load an engine, run one prompt, write the text as it comes. Returns the report, the prompt's tokens and the engine's facts.

    is_raw: continue the prompt as it stands instead of answering it as a chat message.
    """
    client = InProcessClient(lambda: build_engine(config))
    info = await client.start()
    try:
        text = TextProcessor.load(info.tokenizer_path, trust_remote_code=config.model.trust_remote_code)
        prompt_token_ids = text.encode(prompt) if is_raw else text.render_chat([{"role": "user", "content": prompt}])
        stop_token_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(info.eos_token_ids))
        output = text.new_output(stop_token_ids=stop_token_ids, prompt_token_ids=prompt_token_ids if is_raw else ())
        request = EngineRequest(request_id="prompt", prompt_token_ids=prompt_token_ids, params=params, arrival_s=time.monotonic())
        report = RunReport()
        start_s = time.perf_counter()
        async for delta in client.generate(request):
            report.total_s = time.perf_counter() - start_s
            report.first_token_s = report.first_token_s or report.total_s
            report.add(delta)
            write(output.push(delta.token_ids, is_last=delta.finish_reason is not None).text)
        return report, prompt_token_ids, info
    finally:
        await client.close()
