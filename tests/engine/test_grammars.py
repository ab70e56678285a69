"""Grammars through an engine with a real tokenizer: built when first needed, refused before anything runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from medusa_core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from medusa_core.engine.build import build_engine
from medusa_core.engine.in_process import InProcessClient
from medusa_core.errors import InvalidParameterError, UnsupportedParameterError
from medusa_core.outputs import FinishReason
from medusa_core.params import Grammar
from tests.engine.harness import collect, make_request, tokens_of
from tests.engine.tiny_model import EOS_ID, save_tiny_model
from tests.engine.tiny_model import _tokenizer as byte_tokenizer

PROMPT = [40, 50, 60]


def make_client(folder: Path) -> InProcessClient:
    config = EngineConfig(
        model=ModelConfig(model=str(folder), heads="none", dtype="float32", device="cpu"),
        cache=CacheConfig(num_blocks=32),
        scheduler=SchedulerConfig(max_num_seqs=2),
    )
    return InProcessClient(lambda: build_engine(config, progress=False))


async def test_outputs_are_in_the_grammar_and_bad_grammars_cost_one_request(tmp_path, caplog):
    client = make_client(save_tiny_model(tmp_path / "tiny"))
    await client.start()
    try:
        with caplog.at_level(logging.INFO, logger="medusa_core.engine.grammars"):
            await collect(client, make_request("free", PROMPT, max_tokens=2))
            assert not caplog.records
            for text, reason in (("(a", "unclosed group"), (r"[^\s\S]", "no text matches it")):
                with pytest.raises(InvalidParameterError, match=reason) as caught:
                    await collect(client, make_request("bad", PROMPT, grammar=Grammar(kind="regex", text=text, field="a.regex")))
                assert caught.value.param == "a.regex"
            choices = ["yes", "no", "perhaps"]
            grammar = Grammar(kind="choice", text=json.dumps(choices))
            deltas = await collect(client, make_request("good", PROMPT, max_tokens=20, seed=3, n=4, grammar=grammar))
        assert len(caplog.records) == 1
    finally:
        await client.close()
    for choice_idx in range(4):
        token_ids = tokens_of(deltas, choice_idx)
        assert token_ids[-1] == EOS_ID
        assert byte_tokenizer().decode(token_ids[:-1]) in choices


async def test_a_grammar_that_fails_on_the_way_ends_its_request_alone(tmp_path):
    client = make_client(save_tiny_model(tmp_path / "tiny"))
    await client.start()
    try:
        # too many properties, which shows behind the first quote
        properties = {f"p{number}": {"type": "string"} for number in range(600)}
        grammar = Grammar(kind="json_schema", text=json.dumps({"type": "object", "properties": properties}))
        (quote,) = byte_tokenizer().encode('"')
        request = make_request("hostile", PROMPT, max_tokens=100, grammar=grammar, logit_bias=((quote, 100.0),))
        deltas = await collect(client, request)
        assert deltas[-1].finish_reason is FinishReason.GRAMMAR
        assert client.stats.num_blocks_used == 0
        deltas = await collect(client, make_request("good", PROMPT, max_tokens=5, grammar=Grammar(kind="regex", text="ab")))
        assert byte_tokenizer().decode(tokens_of(deltas)[:-1]) == "ab"
    finally:
        await client.close()


async def test_a_model_without_a_tokenizer_refuses_grammars_only(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    client = make_client(folder)
    await client.start()
    try:
        with pytest.raises(UnsupportedParameterError, match="tokenizer") as caught:
            await collect(client, make_request("a", PROMPT, grammar=Grammar(kind="regex", text="a", field="a.regex")))
        assert caught.value.param == "a.regex"
        assert len(tokens_of(await collect(client, make_request("b", PROMPT, max_tokens=3, ignore_eos=True)))) == 3
    finally:
        await client.close()
