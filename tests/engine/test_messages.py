"""What crosses the process boundary comes out as it went in."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from medusa_core.config import EngineConfig, ModelConfig, SpeculationConfig
from medusa_core.engine.messages import Abort, Command, Event, Failed, Outputs, Query, Rejected, Submit, WireError, WorkerSpec
from medusa_core.errors import MedusaError, ModelLoadError, RequestError
from medusa_core.outputs import EngineStats, FinishReason, TokenDelta
from medusa_core.params import Grammar, SamplingParams
from medusa_core.request import EngineRequest


def walk(error_class: type[MedusaError]) -> Iterator[type[MedusaError]]:
    yield error_class
    for child in error_class.__subclasses__():
        yield from walk(child)


ERROR_CLASSES = [error_class for error_class in walk(MedusaError) if error_class.__module__ == "medusa_core.errors"]


def send(message: object, type_: object) -> object:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type_)


@pytest.mark.parametrize("error_class", ERROR_CLASSES)
def test_every_error_class_is_rebuilt_as_itself(error_class):
    fields = {"param": "top_p"} if issubclass(error_class, RequestError) else {}
    error = error_class("It is wrong.", hint="Do this.", **fields)
    rebuilt = send(Rejected("a", WireError.of(error)), Event).error.rebuild()
    assert type(rebuilt) is error_class
    assert str(rebuilt) == "It is wrong. Do this."
    assert vars(rebuilt) == vars(error)


def test_an_error_class_the_receiver_may_not_know_crosses_as_its_base():
    class ShardMissingError(ModelLoadError):
        pass

    assert type(WireError.of(ShardMissingError("gone")).rebuild()) is ModelLoadError


@pytest.mark.parametrize(
    "command",
    [
        Submit(
            EngineRequest(
                request_id="a",
                prompt_token_ids=[1, 2, 3],
                params=SamplingParams(temperature=0.5, seed=-(2**63), max_tokens=7, stop_token_ids=(1, 2), n=3),
                priority=-1,
                arrival_s=1.25,
            )
        ),
        Submit(
            EngineRequest(
                request_id="a",
                prompt_token_ids=[1],
                params=SamplingParams(grammar=Grammar(kind="regex", text="é\n", field="structured_outputs.regex")),
            )
        ),
        Abort("a"),
        Abort("a", 2),
        Query(),
    ],
)
def test_commands_survive_the_wire(command):
    assert send(command, Command) == command


@pytest.mark.parametrize(
    "event",
    [
        Outputs(
            [TokenDelta(request_id="a", choice_idx=1, token_ids=[4, 5], finish_reason=FinishReason.STOP, queue_s=0.5)],
            EngineStats(num_running=3, step_seconds_total=0.25),
        ),
        Outputs([], EngineStats()),
        Failed(WireError.of(MedusaError("lost"))),
    ],
)
def test_events_survive_the_wire(event):
    assert send(event, Event) == event


def test_the_worker_gets_the_same_options():
    config = EngineConfig(
        model=ModelConfig(model="a model", dtype="float32", max_model_len=77), speculation=SpeculationConfig(tree_size=16)
    )
    spec = WorkerSpec(config=config, build="a:b", folder="/somewhere", log_level="INFO")
    line = msgspec.json.encode(spec)
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=WorkerSpec) == spec
