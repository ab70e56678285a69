"""Tiny random models of nine architectures, and heads for them that are sometimes right."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from medusa_core.engine.build import CalibratedHeads
from medusa_core.model.loader import LoadedModel
from medusa_core.model.projection import build_projection
from tests import options

VOCAB_SIZE = 97
EOS_ID = 3
MAX_MODEL_LEN = 256

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    # Wide gaps between logits: equality of tokens must not hang on rounding.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": EOS_ID,
    "pad_token_id": 0,
}
_SMALL_WINDOW = {"sliding_window": 11}

ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {**_SMALL_WINDOW, "head_dim": 12},
    "gemma2": {
        **_SMALL_WINDOW,
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {**_SMALL_WINDOW, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window_pattern": 2},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_oss": {**_SMALL_WINDOW, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@cache
def tiny_model(architecture: str) -> LoadedModel:
    """The same weights for the same name. gpt-oss keeps its attention sinks random too, so that ignoring them would show."""
    torch.manual_seed(sorted(ARCHITECTURES).index(architecture))
    config: PretrainedConfig = CONFIG_MAPPING[architecture](**{**_COMMON, **ARCHITECTURES[architecture]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.normal_()
        elif parameter.dim() > 1:
            parameter.normal_(std=0.3)
    return load_in_memory(model)


def load_in_memory(model: PreTrainedModel, *, max_model_len: int = MAX_MODEL_LEN) -> LoadedModel:
    """A float32 model as the loader would return it."""
    model.eval().requires_grad_(False).to(options.device)
    return LoadedModel(
        model=model,
        project=build_projection(model),
        folder=Path(),
        name=f"tiny-{model.config.model_type}",
        dtype=torch.float32,
        device=torch.device(options.device),
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS_ID,),
    )


class OracleHeads:
    """Heads that know the sequences the model will write, and are wrong about some of it.

    Random heads on a random model are never right, so a tree would never be accepted and most of the code never run. These look the
    lane up by its hidden state and offer the true token at a rank that varies, or not at all.
    """

    num_heads = 3
    draft_vocab_size = None

    def __init__(self, loaded: LoadedModel, sequences: list[list[int]]) -> None:
        trunk = loaded.base_model
        model = loaded.model
        implementation = model.config._attn_implementation
        model.set_attn_implementation("eager")
        states, self._next = [], []
        for sequence in sequences:
            ids = torch.tensor([sequence], device=loaded.device)
            states.append(trunk(input_ids=ids, use_cache=False).last_hidden_state[0])
            self._next += [sequence[position + 2 :] for position in range(len(sequence))]
        model.set_attn_implementation(implementation)
        self._states_SE = torch.cat(states)
        # by number of candidates: offers of every known state, int64 [S, K, C], so that a lookup runs on the device alone
        self._offers: dict[int, Tensor] = {}
        self.num_calls = 0

    def topk(self, hidden_BE: Tensor, num_heads: int, num_candidates: int, *, project: object) -> Tensor:
        self.num_calls += 1
        if num_candidates not in self._offers:
            offers = [
                [self._offer(state, head, num_candidates) for head in range(self.num_heads)] for state in range(len(self._next))
            ]
            self._offers[num_candidates] = torch.tensor(offers, device=hidden_BE.device)
        nearest_B = torch.cdist(hidden_BE.float(), self._states_SE.float()).argmin(dim=1)
        return self._offers[num_candidates][nearest_B, :num_heads]

    def _offer(self, state: int, head: int, num_candidates: int) -> list[int]:
        wrong = [(state * 31 + head * 17 + c * 7) % VOCAB_SIZE for c in range(2 * VOCAB_SIZE)]
        candidates = list(dict.fromkeys(wrong))[:num_candidates]
        rank = (state * 13 + head * 5) % 4
        future = self._next[state]
        if head < len(future) and rank < num_candidates and future[head] not in candidates:
            candidates[rank] = future[head]
        return candidates


def oracle_heads(loaded: LoadedModel, sequences: list[list[int]]) -> CalibratedHeads:
    return CalibratedHeads(OracleHeads(loaded, sequences))  # type: ignore[arg-type]


class ForcedHeads(OracleHeads):
    """Right about the next `depth` tokens, and wrong about what follows: with a chain, each step accepts as many."""

    def __init__(self, loaded: LoadedModel, sequences: list[list[int]], depth: int) -> None:
        super().__init__(loaded, sequences)
        self._depth = depth

    def _offer(self, state: int, head: int, num_candidates: int) -> list[int]:
        future = self._next[state]
        right = future[head] if head < len(future) else 0
        first = right if head < self._depth else (right + 1) % VOCAB_SIZE
        return [(first + rank) % VOCAB_SIZE for rank in range(num_candidates)]
