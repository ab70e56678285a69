"""The same prompts through transformers' own `generate`: batch 1, greedy. Slow, so a few prompts and tokens only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from medusa_core.bench.prompts import TokenPrompt
from medusa_core.bench.records import RequestRecord, RunRecord
from medusa_core.config import ModelConfig
from medusa_core.model.loader import LoadedModel, load_model, use_fast_attention
from medusa_core.runtime.memory import release_memory

VARIANT = "transformers"
_WARM_UP_TOKENS = 8


def run_transformers(
    config: ModelConfig,
    make_prompts: Callable[[Path, int], Sequence[TokenPrompt]],
    *,
    num_prompts: int,
    max_tokens: int,
    ignore_eos: bool,
    progress: bool,
) -> RunRecord:
    """Load the model by itself, run some prompts one by one, and free it again.

    make_prompts: from the tokenizer's folder and the size of the vocabulary. `num_prompts` of them, evenly spread, are run.
    """
    loaded = load_model(config, progress=progress)
    # The loader leaves the attention that our hook replaces; this is what transformers would choose.
    use_fast_attention(loaded)
    prompts = make_prompts(loaded.folder, loaded.vocab_size)
    num_prompts = min(num_prompts, len(prompts))
    indices = [number * len(prompts) // num_prompts for number in range(num_prompts)]
    _generate(loaded, prompts[0], 0, min(max_tokens, _WARM_UP_TOKENS), ignore_eos)
    indices_left = tqdm(indices, desc=VARIANT, unit="request", disable=not progress)
    records = [_generate(loaded, prompts[index], index, max_tokens, ignore_eos) for index in indices_left]
    del loaded
    release_memory()
    return RunRecord(variant=VARIANT, concurrency=1, repetition=0, requests=records)


class _Stopwatch(BaseStreamer):  # type: ignore[misc]  # transformers is untyped to us
    """Notes when each token arrives on the host, where `generate` reads it anyway."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        if self._has_prompt:
            self.times_s.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is held back."""


@torch.inference_mode()
def _generate(loaded: LoadedModel, prompt: TokenPrompt, prompt_idx: int, max_tokens: int, ignore_eos: bool) -> RequestRecord:
    stopwatch = _Stopwatch()
    ids = torch.tensor([prompt.token_ids], device=loaded.device)
    eos = None if ignore_eos or not loaded.eos_token_ids else list(loaded.eos_token_ids)
    # A config of our own: the model's may carry penalties, which are no part of greedy decoding.
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_tokens, eos_token_id=eos, pad_token_id=eos[0] if eos else 0, use_cache=True
    )
    loaded.model.generation_config = config
    start_s = time.perf_counter()
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=stopwatch)
    token_ids = output[0, ids.shape[1] :].tolist()
    end_s = time.perf_counter()
    return RequestRecord(
        prompt_idx=prompt_idx,
        category=prompt.category,
        start_s=start_s,
        end_s=end_s,
        num_prompt_tokens=len(prompt.token_ids),
        num_output_tokens=len(token_ids),
        frame_times_s=stopwatch.times_s,
        frame_num_tokens=[1] * len(stopwatch.times_s),
        num_frames=len(stopwatch.times_s),
        num_plain_steps=max(len(token_ids) - 1, 0),
        num_nodes=max(len(token_ids) - 1, 0),
        token_ids=token_ids,
    )
