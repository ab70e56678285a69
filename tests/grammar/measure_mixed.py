"""What lanes of free text lose beside lanes with a grammar: tokens per second of both, in one engine, without HTTP.

    python -m tests.grammar.measure_mixed --prompts QUESTIONS.jsonl --free 8 24 --structured 8

`alone`: so many lanes of free text. `beside free`: with as many further ones as there are lanes with a grammar otherwise, of which
the first are counted. `beside schema`: with these. All take turns, each at the same prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from medusa_core.bench.offline import drain, make_request
from medusa_core.bench.prompts import read_questions, render_questions
from medusa_core.config import EngineConfig, ModelConfig, SchedulerConfig
from medusa_core.engine.build import build_engine
from medusa_core.engine.worker import SWITCH_INTERVAL_S
from medusa_core.params import Grammar, SamplingParams
from medusa_core.text.processor import TextProcessor


def schema(**string):
    """Of an answer whose texts are such strings."""
    return {
        "type": "object",
        "properties": {
            "title": {"type": "string", **string},
            "answer": {"type": "string", **string},
            "keywords": {"type": "array", "items": {"type": "string", **string}, "minItems": 1, "maxItems": 8},
            "confidence": {"enum": ["low", "medium", "high"]},
            "follow_up": {"type": "boolean"},
        },
        "required": ["title", "answer", "keywords", "confidence", "follow_up"],
        "additionalProperties": False,
    }


ALONE, BESIDE_FREE = "alone", "beside free"
# Masks inside strings of limited length take longest.
SCHEMAS = {"beside schema": schema(), "beside schema of limited strings": schema(maxLength=600)}
PHASES = (ALONE, BESIDE_FREE, *SCHEMAS)


@dataclass
class Count:
    """Of one kind of lane while it was measured. Steps are those of single lanes."""

    num_tokens: int = 0
    num_steps: int = 0
    num_nodes: int = 0


class Lanes:
    """Lanes of one kind that are never idle: the next prompt of each follows as soon as one is answered."""

    def __init__(self, core, kind, num_lanes, prompts, params):
        self._core, self._kind, self._params = core, kind, params
        self._prompts = [prompts[first::num_lanes] for first in range(num_lanes)]
        self._num_asked = [0] * num_lanes
        self._texts = [[] for _ in range(num_lanes)]
        self.answers = []
        self.count = Count()
        for lane in range(num_lanes):
            self._ask(lane)

    def _ask(self, lane):
        prompts = self._prompts[lane]
        prompt = prompts[self._num_asked[lane] % len(prompts)]
        self._num_asked[lane] += 1
        name = f"{self._kind}/{lane}/{self._num_asked[lane]}"
        self._core.submit(make_request(name, prompt.token_ids, self._params, None))

    @property
    def has_begun(self):
        """Whether every lane has emitted something."""
        return all(count > 1 or text for count, text in zip(self._num_asked, self._texts, strict=True))

    def take(self, delta):
        lane = int(delta.request_id.split("/")[1])
        self._texts[lane] += delta.token_ids
        if not delta.is_first:
            self.count.num_tokens += len(delta.token_ids)
            self.count.num_steps += 1
            self.count.num_nodes += delta.num_draft_nodes + 1
        if delta.finish_reason is not None:
            self.answers.append((delta.finish_reason, self._texts[lane]))
            self._texts[lane] = []
            self._ask(lane)

    def stop(self):
        for lane, number in enumerate(self._num_asked):
            self._core.abort(f"{self._kind}/{lane}/{number}")


def measure(core, phase, num_free, options, prompts):
    """Seconds, steps of the engine, and the lanes of each kind."""
    free = SamplingParams(temperature=0.0, max_tokens=options.max_tokens)
    lanes = {"free": Lanes(core, "free", num_free, prompts, free)}
    if phase != ALONE:
        grammar = Grammar(kind="json_schema", text=json.dumps(SCHEMAS[phase])) if phase in SCHEMAS else None
        lanes["beside"] = Lanes(core, "beside", options.structured, prompts[::-1], replace(free, grammar=grammar))

    def step():
        for delta in core.step():
            lanes[delta.request_id.split("/")[0]].take(delta)

    began_s = time.perf_counter()
    while not all(kind.has_begun for kind in lanes.values()) or time.perf_counter() - began_s < options.warm_up:
        step()
    for kind in lanes.values():
        kind.count = Count()
    num_steps, start_s = core.stats().num_steps_total, time.perf_counter()
    while (seconds := time.perf_counter() - start_s) < options.seconds:
        step()
    num_steps = core.stats().num_steps_total - num_steps
    counts = {name: kind.count for name, kind in lanes.items()}
    for kind in lanes.values():
        kind.stop()
    drain(core)
    return seconds, num_steps, counts, lanes["beside"].answers if phase in SCHEMAS else []


def figures(count, seconds):
    rate, per_step, nodes = count.num_tokens / seconds, count.num_tokens / count.num_steps, count.num_nodes / count.num_steps
    return f"{rate:8,.0f} tokens/s, {per_step:.2f} a step of {nodes:4.1f} nodes"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines of Spec-Bench's format.")
    parser.add_argument("--model", help="The demo model if not given.")
    parser.add_argument("--heads")
    parser.add_argument("--free", type=int, nargs="+", default=[8, 24], help="Lanes of free text.")
    parser.add_argument("--structured", type=int, default=8, help="Lanes with a grammar.")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--warm-up", type=float, default=1.0, help="Seconds.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    # as in a server
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    scheduler = SchedulerConfig(max_num_seqs=max(options.free) + options.structured)
    core = build_engine(EngineConfig(model=ModelConfig(model=options.model, heads=options.heads), scheduler=scheduler))
    text = TextProcessor.load(core.info.tokenizer_path)
    prompts = render_questions(read_questions(options.prompts), text)
    prompts = [prompt for prompt in prompts if len(prompt.token_ids) + options.max_tokens <= core.info.max_model_len]
    rates = defaultdict(list)
    num_json = num_answers = 0
    for number in range(options.rounds):
        for num_free in options.free:
            for phase in (*PHASES[number % len(PHASES) :], *PHASES[: number % len(PHASES)]):
                seconds, num_steps, counts, answers = measure(core, phase, num_free, options, prompts)
                rates[num_free, phase].append(counts["free"].num_tokens / seconds)
                print(f"round {number + 1}, {num_free} free lanes {phase}: {seconds / num_steps * 1e3:.3f} ms a step")
                for kind, count in counts.items():
                    print(f"  {kind:>6}: {figures(count, seconds)}", flush=True)
                for reason, token_ids in answers:
                    if reason.value == "stop":
                        num_answers += 1
                        num_json += is_json(text.decode(token_ids))
    for num_free in options.free:
        alone = statistics.median(rates[num_free, ALONE])
        for phase in PHASES:
            rate = statistics.median(rates[num_free, phase])
            lowest, highest = min(rates[num_free, phase]), max(rates[num_free, phase])
            change = f"{rate / alone - 1:+.1%}"
            print(f"{num_free} free lanes {phase}: median {rate:,.0f} tokens/s ({lowest:,.0f} to {highest:,.0f}), {change}")
    print(f"{num_json} of {num_answers} structured answers that ended were JSON")


def is_json(text):
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


if __name__ == "__main__":
    main()
