"""Per-request sampling parameters: what the engine does with a request, in tokens. Text (stop strings) is the front end's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from medusa_core.errors import InvalidParameterError

# Of the API.
_MAX_BIAS = 100.0
# Alternatives per token: of the API, as for chat completions.
MAX_LOGPROBS = 20
# Each token drawn is compared with all stop ids of all lanes, so one long list would slow every request.
MAX_STOP_TOKEN_IDS = 128
# Far beyond any use; keeps products and quotients of logits finite.
_MAX_REPETITION_PENALTY = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """The language that an output must be a text of. Checked where it is compiled (medusa_core/grammar).

    kind: what `text` holds: a JSON schema; a regular expression for the whole output; a JSON list of strings, one of which is the
        output; a context-free grammar in Lark's notation, or in that of llama.cpp (GBNF).
    field: what the API calls it; errors name it.
    """

    kind: Literal["json_schema", "regex", "choice", "cfg"]
    text: str
    field: str = "grammar"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens. Validated on construction; raises InvalidParameterError naming the field.

    temperature: 0 is greedy. top_p in (0, 1], top_k 0 = off, min_p in [0, 1]. Filters apply in the order temperature, top_k,
        top_p, min_p; ties at a threshold are kept.
    presence_penalty, frequency_penalty in [-2, 2]: over the output. repetition_penalty in [0.01, 100], 1 = off: over prompt and
        output.
    logit_bias: pairs of a token id, each once, and a value in [-100, 100], added to the logits. sampling/penalties.py has the
        formulas and their order.
    seed: 64-bit; None draws fresh random bits for each choice.
    max_tokens: most tokens to emit; None = as many as fit in the context. 0 computes the prompt and ends.
    min_tokens: tokens emitted before EOS or a stop token id may be drawn.
    stop_token_ids: ids that end the output (emitted as its last token).
    num_logprobs: report the log-probability of each token emitted, and so many of the most likely tokens, 0 to 20; None for
        neither. Of the model's own distribution: before penalties, biases, temperature and filters.
    num_prompt_logprobs: the same of each prompt token but the first. The prompt is then computed whole, whatever of it is cached.
    n: choices; choice i is drawn with noise key (seed, i), so choice 0 equals the n = 1 output.
    typical_acceptance: (epsilon, delta), each above 0 and at most 1: drafts that the model could well have said are kept
        (speculation/typical.py), which changes the output; None keeps what the model draws. At temperature 0 it is None too. It
        looks at probabilities before top_k, top_p and min_p, so it cannot be combined with them.
    grammar: only tokens that continue a text of it can be drawn, and EOS only at the end of one. Then `min_tokens` holds back the
        end only where the grammar has another way to go on, and EOS cannot be ignored.
    prediction: what the output may be, in tokens. It is drafted from (speculation/lookup.py), and never changes the tokens.
    max_nodes: most nodes of this request's trees, root included; None leaves it to the engine. It never changes the tokens.
    is_speculation_enabled: False decodes this request one token per step. It never changes the tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    n: int = 1
    typical_acceptance: tuple[float, float] | None = None
    grammar: Grammar | None = None
    prediction: tuple[int, ...] = ()
    max_nodes: int | None = None
    is_speculation_enabled: bool = True

    def __post_init__(self) -> None:
        self._check("temperature", 0.0 <= self.temperature <= 2.0, "between 0 and 2")
        self._check("top_p", 0.0 < self.top_p <= 1.0, "greater than 0 and at most 1")
        self._check("top_k", self.top_k >= 0, "0 (off) or a positive integer")
        self._check("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, -2.0 <= getattr(self, name) <= 2.0, "between -2 and 2")
        is_moderate = 1.0 / _MAX_REPETITION_PENALTY <= self.repetition_penalty <= _MAX_REPETITION_PENALTY
        self._check("repetition_penalty", is_moderate, "between 0.01 and 100")
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise InvalidParameterError("logit_bias names a token more than once.", param="logit_bias")
        for token_id, value in self.logit_bias:
            # NaN fails the comparison
            if not -_MAX_BIAS <= value <= _MAX_BIAS:
                raise InvalidParameterError(
                    f"logit_bias of token {token_id} must be between -100 and 100, got {value}.", param="logit_bias"
                )
        self._check("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer")
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 0, "at least 0")
        self._check("min_tokens", self.min_tokens >= 0, "at least 0")
        for name in ("num_logprobs", "num_prompt_logprobs"):
            count = getattr(self, name)
            self._check(name, count is None or 0 <= count <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
        self._check("max_nodes", self.max_nodes is None or self.max_nodes >= 1, "at least 1")
        if self.typical_acceptance is not None:
            self._check("typical_acceptance", all(0.0 < value <= 1.0 for value in self.typical_acceptance), "above 0 and at most 1")
            filters = [name for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)) if getattr(self, name) != off]
            if filters:
                raise InvalidParameterError(f"Typical acceptance cannot be combined with {filters[0]}.", param=filters[0])
        self._check("n", 1 <= self.n <= 128, "between 1 and 128")
        if self.max_tokens is not None:
            self._check("min_tokens", self.min_tokens <= self.max_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.grammar is not None and self.ignore_eos:
            raise InvalidParameterError(
                f"ignore_eos cannot be combined with {self.grammar.field}: its output ends where the grammar does; leave it out.",
                param="ignore_eos",
            )

    def _check(self, field: str, is_valid: bool, expected: str) -> None:
        value = getattr(self, field)
        # Comparisons with NaN are False, so NaN never passes; infinities fail the range checks.
        if not is_valid or (isinstance(value, float) and not math.isfinite(value)):
            raise InvalidParameterError(f"{field} must be {expected}, got {value}.", param=field)

    @property
    def has_penalties(self) -> bool:
        """Whether anything changes the logits of single tokens."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1.0)
        return bool(self.logit_bias) or any(penalties)

    @property
    def is_typical(self) -> bool:
        """Whether drafts are accepted that would not have been drawn."""
        return self.typical_acceptance is not None and not self.is_greedy

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0
