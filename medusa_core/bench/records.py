"""What a benchmark observes, before any arithmetic. Times are seconds on one monotonic clock of the machine."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request, from the moment it was sent.

    prompt_idx: place of its prompt in the list of the benchmark. num_prompt_tokens: as told by the server, or counted.
    frame_times_s: arrival of each delivery that carried tokens: a step's tokens in process, a frame of the stream over HTTP.
    frame_num_tokens: tokens in each of them; empty where only the total is known.
    num_frames: all frames of a stream, those without tokens too; equals len(frame_times_s) in process.
    num_output_tokens: as the engine emitted them or as `usage` states. end_s: when the answer was complete, or failed.
    num_draft_steps, num_draft_step_tokens: steps that offered a tree, and the tokens those steps emitted, bonus included.
    num_plain_steps: steps without a tree. The first token belongs to no step. num_nodes: of all steps, roots included.
    error: why it failed, or None. A failed request counts as an error and nowhere else.
    """

    prompt_idx: int
    category: str
    start_s: float
    end_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    frame_times_s: list[float] = field(default_factory=list)
    frame_num_tokens: list[int] = field(default_factory=list)
    num_frames: int = 0
    num_draft_steps: int = 0
    num_draft_step_tokens: int = 0
    num_plain_steps: int = 0
    num_nodes: int = 0
    token_ids: list[int] = field(default_factory=list)
    error: str | None = None


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """All requests of one run: one variant at one load, once.

    concurrency: requests kept open at once; None where requests arrive by a rate. num_engine_steps: steps of the engine, however
    many lanes each had; None where it cannot be seen.
    """

    variant: str
    concurrency: int | None
    repetition: int
    requests: list[RequestRecord]
    num_engine_steps: int | None = None
    request_rate: float | None = None

    @property
    def seconds(self) -> float:
        """From the first request sent to the last one answered."""
        if not self.requests:
            return 0.0
        return max(record.end_s for record in self.requests) - min(record.start_s for record in self.requests)

    @property
    def answered(self) -> list[RequestRecord]:
        return [record for record in self.requests if record.error is None]
