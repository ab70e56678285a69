"""What the requests of one front end do."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from medusa_core.outputs import TokenDelta
from server.metrics import buckets
from server.metrics.collectors import Count, TokenCounter, TokenHistogram, TokenRate


class GenerationMetrics:
    """Choices, their tokens and their steps, labelled with the model's served name. Created once the model is known.

    max_depth: longest path of the tree; 0 where nothing drafts. max_model_len: most tokens of prompt and output. num_open_requests:
    as EngineClient's.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        model_name: str,
        max_depth: int,
        max_model_len: int,
        num_open_requests: Callable[[], int],
    ) -> None:
        self._registry = registry
        self._model_name = model_name
        self._token_rate = TokenRate()
        # Of each 1, so that their sum is how many there are.
        Gauge("medusa_front_ends", "HTTP processes that take requests.", ("model_name",), registry=registry).labels(model_name).set(
            1
        )
        open_requests = Gauge(
            "medusa_open_requests",
            "Requests handed to the engine whose end it has not told, as the HTTP side sees it.",
            ("model_name",),
            registry=registry,
        )
        open_requests.labels(model_name).set_function(num_open_requests)
        self._create_token_metrics(buckets.up_to(max_model_len))
        self._create_time_metrics()
        self._create_speculation_metrics(max_depth)

    def _counter(self, name: str, help_text: str) -> Count:
        return TokenCounter(f"medusa_{name}", help_text, ("model_name",), self._registry).labels(self._model_name)

    def _histogram(self, name: str, help_text: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"medusa_{name}", help_text, ("model_name",), registry=self._registry, buckets=bounds)
        return histogram.labels(self._model_name)

    def _token_histogram(self, name: str, help_text: str, bounds: tuple[float, ...]) -> TokenHistogram:
        return TokenHistogram(f"medusa_{name}", help_text, {"model_name": self._model_name}, self._registry, bounds=bounds)

    def _create_token_metrics(self, lengths: tuple[float, ...]) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that got a first token.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Of them, those found in the prefix cache.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens emitted, after trimming at stop strings.")
        self._discarded_tokens = self._counter("discarded_tokens", "Tokens the engine emitted past a stop string.")
        self._prompt_length = self._histogram("request_prompt_tokens", "Tokens of each prompt that got a first token.", lengths)
        self._output_length = self._histogram(
            "request_generation_tokens", "Tokens of each choice that got any, when it ended, however it did.", lengths
        )
        tokens_per_second = Gauge(
            "medusa_tokens_per_second",
            "Tokens emitted per second over the last ten seconds.",
            ("model_name",),
            registry=self._registry,
        )
        tokens_per_second.labels(self._model_name).set_function(self._token_rate.per_second)

    def _create_time_metrics(self) -> None:
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token, per choice.", buckets.TTFT)
        self._itl = self._token_histogram(
            "inter_token_latency_seconds",
            "Time between arrivals of tokens over the tokens that arrived together, observed once per token.",
            buckets.INTER_TOKEN,
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token, per choice.", buckets.LATENCY)
        self._queue_time = self._histogram("request_queue_time_seconds", "Wait for a lane, per choice.", buckets.LATENCY)
        self._prefill_time = self._histogram(
            "request_prefill_time_seconds", "From a lane to the first token, per choice.", buckets.LATENCY
        )
        self._decode_time = self._histogram(
            "request_decode_time_seconds", "First token to last, per choice that came to its end.", buckets.LATENCY
        )
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "First token to last over the tokens behind the first, per choice of two or more that came to its end.",
            buckets.INTER_TOKEN,
        )
        self._finished = Counter(
            "medusa_request_success",
            "Choices that ended, by reason: stop, length, abort (client gone), error.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(self._model_name, reason)

    def _create_speculation_metrics(self, max_depth: int) -> None:
        self._acceptance_length = self._token_histogram(
            "acceptance_length",
            "Tokens kept of a verification step with draft nodes, bonus included.",
            tuple(float(length) for length in range(1, max_depth + 2)),
        )
        self._drafts = self._counter("spec_decode_num_drafts", "Verification steps with draft nodes, per choice.")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Depth offered: longest path of each draft.")
        self._accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "Draft tokens accepted, after trimming.")
        self._tree_nodes = self._counter("spec_decode_num_tree_nodes", "Tree nodes offered, root excluded.")
        self._plain_steps = self._counter("plain_steps", "Decode steps without draft nodes, per choice.")
        per_position = TokenCounter(
            "medusa_spec_decode_num_accepted_tokens_per_pos",
            "Drafts whose accepted length exceeds the position.",
            ("model_name", "position"),
            self._registry,
        )
        self._accepted_at = [per_position.labels(self._model_name, str(position)) for position in range(max_depth)]

    def observe_prompt(self, num_tokens: int, *, num_cached: int) -> None:
        """A prompt whose first token came, `num_cached` of its own having been in the prefix cache."""
        self._prompt_tokens.value += num_tokens
        self._cached_tokens.value += num_cached
        self._prompt_length.observe(num_tokens)

    def observe_first_delta(self, *, ttft_s: float, queue_s: float) -> None:
        self._ttft.observe(ttft_s)
        self._queue_time.observe(queue_s)
        self._prefill_time.observe(max(ttft_s - queue_s, 0.0))

    def observe_delta(self, delta: TokenDelta, *, num_kept: int) -> None:
        """Count one delta of one choice, of which `num_kept` tokens survived trimming."""
        if num_kept < len(delta.token_ids):
            self.observe_discarded(len(delta.token_ids) - num_kept)
        if num_kept == 0:
            return
        self._generation_tokens.value += num_kept
        self._token_rate.add(num_kept)
        if delta.num_draft_nodes > 0:
            self._observe_draft(delta, num_kept)
        elif not delta.is_first:
            self._plain_steps.value += 1

    def observe_interval(self, interval_s: float, *, num_tokens: int) -> None:
        """`num_tokens` kept tokens of a choice arrived together, `interval_s` after those before them."""
        if num_tokens:
            self._itl.observe(interval_s / num_tokens, times=num_tokens)

    def _observe_draft(self, delta: TokenDelta, num_kept: int) -> None:
        num_accepted = min(delta.num_accepted, num_kept)
        self._drafts.value += 1
        self._draft_tokens.value += delta.draft_depth
        self._tree_nodes.value += delta.num_draft_nodes
        self._accepted_tokens.value += num_accepted
        for count in self._accepted_at[:num_accepted]:
            count.value += 1
        self._acceptance_length.observe(num_kept)

    def observe_discarded(self, num_tokens: int) -> None:
        self._discarded_tokens.value += num_tokens

    def observe_finish(self, reason: str, *, num_tokens: int, decode_s: float, e2e_s: float) -> None:
        """A choice ended with `num_tokens` tokens, `decode_s` between the first and the last of them."""
        self._finished.labels(self._model_name, reason).inc()
        if num_tokens:
            self._output_length.observe(num_tokens)
        if reason in ("stop", "length"):
            self._e2e.observe(e2e_s)
            self._decode_time.observe(decode_s)
            if num_tokens > 1:
                self._tpot.observe(decode_s / (num_tokens - 1))
