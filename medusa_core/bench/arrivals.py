"""What those who decode notice of those who arrive: time between tokens, alone and beside a steady stream of long prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from medusa_core.bench.figures import Spread, frame_gaps_s, spread, token_gaps_s
from medusa_core.bench.offline import add_delta, drain, make_request
from medusa_core.bench.prompts import random_prompts
from medusa_core.bench.records import RequestRecord
from medusa_core.engine.core import EngineCore
from medusa_core.params import SamplingParams

# An engine slower than the arrivals would collect them for ever.
_MAX_OPEN = 64


@dataclass(frozen=True, kw_only=True)
class ArrivalPlan:
    """`num_decoding` lanes emit `decode_len` tokens each. Meanwhile, a prompt of `arrival_len` tokens arrives every `interval_s`
    seconds and is answered with one token."""

    num_decoding: int = 8
    decode_prompt_len: int = 128
    decode_len: int = 512
    arrival_len: int = 1024
    interval_s: float = 0.05


@dataclass(frozen=True, kw_only=True)
class ArrivalEffect:
    """Inter-token latencies of the decoding lanes, from the moment when all of them decode.

    num_left_out: arrivals that were due while too many others were still open.
    """

    plan: ArrivalPlan
    num_arrivals: int
    num_left_out: int
    alone_frame_s: Spread | None
    alone_token_s: Spread | None
    beside_frame_s: Spread | None
    beside_token_s: Spread | None


def why_no_arrivals(core: EngineCore, plan: ArrivalPlan) -> str | None:
    """The reason why this engine cannot run the plan, or None."""
    info = core.info
    longest = max(plan.arrival_len + 1, plan.decode_prompt_len + plan.decode_len)
    if info.max_num_seqs <= plan.num_decoding:
        return f"needs more than {plan.num_decoding} lanes, the engine has {info.max_num_seqs}"
    if longest > info.max_model_len:
        return f"{longest} tokens exceed max_model_len ({info.max_model_len})"
    return None


def measure_arrivals(
    core: EngineCore, plan: ArrivalPlan, *, progress: bool, clock: Callable[[], float] = time.perf_counter
) -> ArrivalEffect:
    """Run the plan without arrivals, then with them, on an idle engine without a prefix cache."""
    with tqdm(total=2 * plan.num_decoding, desc="arrivals", disable=not progress) as bar:
        alone = _Scene(core, plan, has_arrivals=False, clock=clock, on_finished=bar.update).run()
        scene = _Scene(core, plan, has_arrivals=True, clock=clock, on_finished=bar.update)
        beside = scene.run()
    return ArrivalEffect(
        plan=plan,
        num_arrivals=scene.num_arrivals,
        num_left_out=scene.num_left_out,
        alone_frame_s=spread(gap for record in alone for gap in frame_gaps_s(record)),
        alone_token_s=spread(gap for record in alone for gap in token_gaps_s(record)),
        beside_frame_s=spread(gap for record in beside for gap in frame_gaps_s(record)),
        beside_token_s=spread(gap for record in beside for gap in token_gaps_s(record)),
    )


class _Scene:
    """One run. A delivery to a decoding lane counts once every one of them has its first token."""

    def __init__(
        self,
        core: EngineCore,
        plan: ArrivalPlan,
        *,
        has_arrivals: bool,
        clock: Callable[[], float],
        on_finished: Callable[[], object],
    ) -> None:
        self.num_arrivals = 0
        self.num_left_out = 0
        self._core = core
        self._plan = plan
        self._has_arrivals = has_arrivals
        self._clock = clock
        self._on_finished = on_finished
        self._num_open = 0
        self._num_decoding = plan.num_decoding
        self._waiting_for_first = plan.num_decoding
        self._started_s: float | None = None
        self._records: dict[str, RequestRecord] = {}
        self._arrivals = random_prompts(_MAX_OPEN, plan.arrival_len, core.info.vocab_size, seed=2)

    def run(self) -> list[RequestRecord]:
        """Records of the decoding lanes."""
        plan = self._plan
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=plan.decode_len)
        for idx, prompt in enumerate(random_prompts(plan.num_decoding, plan.decode_prompt_len, self._core.info.vocab_size, seed=1)):
            request_id = f"decoding {idx}"
            self._records[request_id] = RequestRecord(prompt_idx=idx, category="", start_s=self._clock())
            self._core.submit(make_request(request_id, prompt.token_ids, params, None))
        while self._num_decoding:
            if self._has_arrivals and self._started_s is not None:
                self._submit_due(self._clock() - self._started_s)
            self._step()
        drain(self._core)
        return list(self._records.values())

    def _submit_due(self, elapsed_s: float) -> None:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1)
        num_due = int(elapsed_s / self._plan.interval_s) + 1
        while self.num_arrivals + self.num_left_out < num_due:
            if self._num_open == _MAX_OPEN:
                self.num_left_out += 1
                continue
            prompt = self._arrivals[self.num_arrivals % len(self._arrivals)]
            self._core.submit(make_request(f"arrival {self.num_arrivals}", prompt.token_ids, params, None))
            self.num_arrivals += 1
            self._num_open += 1

    def _step(self) -> None:
        deltas = self._core.step()
        now_s = self._clock()
        for delta in deltas:
            is_finished = delta.finish_reason is not None
            record = self._records.get(delta.request_id)
            if record is None:
                self._num_open -= is_finished
                continue
            self._waiting_for_first -= delta.is_first
            if self._waiting_for_first == 0:
                add_delta(record, delta, now_s)
            if is_finished:
                self._num_decoding -= 1
                self._on_finished()
        if self._started_s is None and self._waiting_for_first == 0:
            self._started_s = now_s
