"""Making fake engines and reading their streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from medusa_core.config import EngineConfig, ModelConfig, SchedulerConfig
from medusa_core.engine.client import EngineClient
from medusa_core.engine.in_process import InProcessClient
from medusa_core.engine.worker_client import WorkerClient
from medusa_core.outputs import TokenDelta
from medusa_core.params import SamplingParams
from medusa_core.request import EngineRequest
from tests.engine import fake

FAKE_BUILD = "tests.engine.fake:build"
SLOW = "delay=0.005"


def make_config(behaviour: str = "", **scheduler: int) -> EngineConfig:
    return EngineConfig(model=ModelConfig(model=behaviour), scheduler=SchedulerConfig(**scheduler))


def make_worker_client(config: EngineConfig) -> WorkerClient:
    return WorkerClient(config, build=FAKE_BUILD, restart_delays_s=(0.05,))


def make_in_process_client(config: EngineConfig) -> InProcessClient:
    return InProcessClient(lambda: fake.build(config, progress=False))


def make_request(request_id: str, prompt: list[int], **params) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=SamplingParams(**params))


async def collect(client: EngineClient, request: EngineRequest) -> list[TokenDelta]:
    return [delta async for delta in client.generate(request)]


def tokens_of(deltas: list[TokenDelta], choice_idx: int = 0) -> list[int]:
    return [token_id for delta in deltas if delta.choice_idx == choice_idx for token_id in delta.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)
