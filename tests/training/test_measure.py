"""What is measured of heads is what the engine then does with them, step by step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medusa_core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SpeculationConfig
from medusa_core.engine.build import CalibratedHeads, assemble_engine, build_engine
from medusa_core.errors import ConfigError
from medusa_core.model.checkpoint import load_heads
from medusa_core.model.loader import load_model
from medusa_core.model.sequential_heads import HeadsShape
from medusa_core.params import SamplingParams
from medusa_core.request import EngineRequest
from medusa_core.training.answers import Answer, answer_prompts
from medusa_core.training.export import export_heads
from medusa_core.training.measure import MeasuredAnswer, calibrate, observed_lookups, observed_ranks, tokens_per_step
from medusa_core.training.packing import pack_samples
from medusa_core.training.plan import TrainingPlan
from medusa_core.training.samples import answer_sample
from medusa_core.training.trainer import Trainer
from medusa_core.tree.merge import MAX_LOOKUP_DEPTH
from medusa_core.tree.topology import TreeTopology
from tests.engine.tiny_model import HIDDEN_SIZE, VOCAB_SIZE, save_tiny_model

NUM_HEADS = 3
PROMPTS = [(f"category {n % 2}", [1, 10 + n, 40 + n, 7]) for n in range(12)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40)
CANDIDATES = 4


def config(folder: Path, *, heads: str = "none", num_lanes: int = 4) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(folder), heads=heads, dtype="float32", device="cpu"),
        cache=CacheConfig(num_blocks=100),
        scheduler=SchedulerConfig(max_num_seqs=num_lanes),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("training") / "tiny")


@pytest.fixture(scope="module")
def answers(folder) -> list[Answer]:
    return answer_prompts(build_engine(config(folder), progress=False), PROMPTS, GREEDY, progress=False)


@pytest.fixture(scope="module")
def heads_file(folder, answers) -> Path:
    """Heads that are right now and then: output layers fitted to half of the answers by least squares."""
    loaded = load_model(config(folder).model, progress=False)
    tensors = {}
    for head in range(NUM_HEADS):
        hidden, target = [], []
        for answer in answers[::2]:
            ids = answer.prompt_token_ids + answer.output_token_ids
            with torch.inference_mode():
                states = loaded.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            hidden.append(states[: -2 - head])
            target += ids[2 + head :]
        x = torch.cat(hidden)
        one_hot = torch.nn.functional.one_hot(torch.tensor(target), VOCAB_SIZE).float()
        weight = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(HIDDEN_SIZE), x.T @ one_hot).T
        tensors |= {f"{head}.0.linear.weight": torch.zeros(HIDDEN_SIZE, HIDDEN_SIZE), f"{head}.1.weight": weight.contiguous()}
    path = folder / "heads.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def sequential_file(folder, answers) -> Path:
    """Heads that know the tokens in between, fitted to half of the answers."""
    loaded = load_model(config(folder).model, progress=False)
    rows, _ = pack_samples([answer_sample(answer) for answer in answers[::2]], 64)
    shape = HeadsShape(num_heads=NUM_HEADS, mlp_size=48, output="low-rank", has_markov_term=True, rank=8)
    trainer = Trainer(loaded, rows, TrainingPlan(shape=shape, epochs=40, rows_per_update=2, learning_rate=0.01), None)
    assert len(list(trainer.run())) == trainer.num_updates
    path = folder / "sequential.safetensors"
    export_heads(trainer.trained, path, token_map_V=None, dtype=torch.float32, metadata={})
    return path


@pytest.fixture(params=["medusa", "sequential"])
def any_heads_file(request) -> Path:
    return request.getfixturevalue("heads_file" if request.param == "medusa" else "sequential_file")


def test_answers_are_complete_and_in_the_order_of_the_prompts(folder, answers):
    assert [(answer.category, answer.prompt_token_ids) for answer in answers] == PROMPTS
    assert all(1 <= len(answer.output_token_ids) <= 40 for answer in answers)
    alone = answer_prompts(build_engine(config(folder, num_lanes=1), progress=False), PROMPTS[5:6], GREEDY, progress=False)
    assert alone == answers[5:6]


def test_a_prompt_that_does_not_fit_is_refused_before_anything_runs(folder):
    core = build_engine(config(folder), progress=False)
    with pytest.raises(ConfigError, match=r"Prompt 2 has 100 tokens; with 40 of output it exceeds the context of 128"):
        answer_prompts(core, [PROMPTS[0], ("long", [5] * 100)], GREEDY, progress=False)
    assert not core.has_work


def test_ranks_are_those_of_the_tokens_that_follow_each_root(folder, answers, any_heads_file):
    loaded = load_model(config(folder).model, progress=False)
    heads = load_heads(any_heads_file, loaded)
    embed = loaded.model.get_input_embeddings()
    answer = answers[1]
    ranks = observed_ranks(heads, loaded, answer, CANDIDATES)
    assert ranks.shape == (len(answer.output_token_ids) - 1, NUM_HEADS)
    for root in range(len(ranks)):
        known = answer.prompt_token_ids + answer.output_token_ids[:root]  # up to the token before the root
        with torch.inference_mode():
            hidden = loaded.base_model(input_ids=torch.tensor([known]), use_cache=False).last_hidden_state[0, -1:]
            before = (answer.output_token_ids[root : root + NUM_HEADS] + [0] * NUM_HEADS)[:NUM_HEADS]
            lists = heads.candidates_along(hidden, torch.tensor([before]), CANDIDATES, project=loaded.project, embed=embed)
            lists = lists[0].tolist()
        followers = answer.output_token_ids[root + 1 : root + 1 + NUM_HEADS]
        expected = [
            guesses.index(token) if token in guesses else CANDIDATES for guesses, token in zip(lists, followers, strict=False)
        ]
        assert ranks[root].tolist() == expected + [CANDIDATES] * (NUM_HEADS - len(expected))


@pytest.mark.parametrize("prompt_lookup", [False, True])
@pytest.mark.parametrize("num_nodes", [4, 16])
def test_the_engine_accepts_what_was_measured(folder, answers, any_heads_file, num_nodes, prompt_lookup):
    """Steps of the engine with the calibrated tree, one by one: each accepts the measured path as far as the tree has it, or what
    lookup has right if that is longer."""
    loaded = load_model(config(folder).model, progress=False)
    heads = load_heads(any_heads_file, loaded)
    calibration, measured = calibrate(heads, loaded, answers, source="a test", num_candidates=CANDIDATES)
    tree = (calibration.lookup_tree if prompt_lookup else calibration.tree).prefix(num_nodes)
    choices = set(tree.choices)

    speculative = config(folder)
    speculation = SpeculationConfig(tree_size=num_nodes, prompt_lookup=prompt_lookup)
    speculative = dataclasses.replace(speculative, speculation=speculation)
    core = assemble_engine(speculative, loaded, CalibratedHeads(heads, calibration))
    num_drafts = num_steps = num_lookups = 0
    for answer, expected in zip(answers, measured, strict=True):
        starts = list(expected.steps(tree))
        core.submit(EngineRequest(request_id="one", prompt_token_ids=answer.prompt_token_ids, params=GREEDY))
        output: list[int] = []
        while core.has_work:
            for delta in core.step():
                if delta.num_draft_nodes:
                    assert starts.pop(0) == len(output) - 1
                    path = expected.paths[len(output) - 1]
                    by_heads = next(length for length in range(len(path), -1, -1) if not length or path[:length] in choices)
                    by_lookup = min(expected.lookup_lens[len(output) - 1], tree.lookup_depth)
                    accepted = max(by_heads, by_lookup)
                    assert delta.num_accepted == accepted
                    num_lookups += by_lookup > by_heads
                    num_drafts += accepted
                    num_steps += 1
                output += delta.token_ids
        assert output == answer.output_token_ids
        # what is left is where only the last token was missing, for which no tree is offered
        assert not starts or starts == [len(output) - 2]
    assert sum(len(answer.paths) for answer in measured) == calibration.num_tokens
    assert num_drafts > 20, "these heads are never right, so nothing was compared"
    assert (num_lookups > 0) == (prompt_lookup and tree.lookup_depth > 0)
    assert tokens_per_step(tree, measured) == pytest.approx(calibration.num_tokens / num_steps, rel=0.1)


def test_levels_cost_where_they_are_drafted_one_after_the_other(folder, answers, heads_file, sequential_file):
    loaded = load_model(config(folder).model, progress=False)

    def calibrated_for(path, level_cost):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("medusa_core.training.measure._LEVEL_COST", level_cost)
            heads = load_heads(path, loaded)
            return calibrate(heads, loaded, answers, source="a test", num_candidates=CANDIDATES)[0].tree

    assert calibrated_for(heads_file, 10.0) == calibrated_for(heads_file, 0.0)
    assert calibrated_for(sequential_file, 10.0).choices[:CANDIDATES] == tuple((rank,) for rank in range(CANDIDATES))
    assert calibrated_for(sequential_file, 0.0).prefix(CANDIDATES + 1).max_depth > 1


def test_a_calibration_is_worth_what_it_says(folder, answers, heads_file):
    loaded = load_model(config(folder).model, progress=False)
    calibration, measured = calibrate(load_heads(heads_file, loaded), loaded, answers, source="a test", num_candidates=CANDIDATES)
    assert [len(shares) for shares in calibration.rank_accuracy] == [CANDIDATES] * NUM_HEADS
    first_right = sum(path[:1] == (0,) for answer in measured for path in answer.paths)
    assert calibration.rank_accuracy[0][0] == pytest.approx(first_right / calibration.num_tokens)
    # Shares of rarely seen parents lean on what the heads do anywhere, so the two need not be equal.
    expected = 1 + sum(calibration.node_acceptance[: 16 - 1])
    assert expected == pytest.approx(tokens_per_step(calibration.tree.prefix(16), measured), rel=0.1)


def test_a_tree_is_chosen_for_where_steps_start():
    """A step that goes far is followed by one behind it, so hard places count more than their share of the text."""
    easy, hard = (0, 0, 0), (1,)
    answer = MeasuredAnswer(category="any", paths=(easy, easy, easy, easy, hard, hard) * 2, lookup_lens=(0, 0, 0, 0, 9, 0) * 2)
    tree = TreeTopology(((0,), (0, 0), (0, 0, 0)))
    assert list(answer.steps(tree)) == [0, 4, 5, 6, 10, 11]
    assert tokens_per_step(tree, [answer]) == 12 / 6
    with_lookup = TreeTopology((*tree.choices, (-1,)))
    assert list(answer.steps(with_lookup)) == [0, 4, 6, 10]


def test_lookups_see_the_text_up_to_the_root_alone():
    answer = Answer(prompt_token_ids=[1, 2, 3, 4, 1], output_token_ids=[2, 3, 4, 9, 2, 3, 8], category="any")
    # behind 2: 3 4, then 1 for 9; behind 9, which is new: 9 for 2; behind the second 2: 3 4 for 3 8
    assert observed_lookups(answer) == (2, 1, 0, 0, 1, 0)


def test_gains_are_what_steps_of_each_size_emit(folder, answers, heads_file):
    loaded = load_model(config(folder).model, progress=False)
    calibration, measured = calibrate(load_heads(heads_file, loaded), loaded, answers, source="a test", num_candidates=CANDIDATES)
    tree, gains = calibration.lookup_tree, calibration.lookup_gains
    assert 0 < tree.lookup_depth <= MAX_LOOKUP_DEPTH
    assert tree.head_depth > 0
    for size in (4, 8, 16, 32):
        assert 1 + sum(gains[: size - 1]) == pytest.approx(tokens_per_step(tree.prefix(size), measured))
    assert tokens_per_step(tree.prefix(32), measured) > tokens_per_step(calibration.tree.prefix(32), measured)


def test_answers_of_one_token_measure_nothing(folder, heads_file):
    loaded = load_model(config(folder).model, progress=False)
    heads = load_heads(heads_file, loaded)
    short = [Answer(prompt_token_ids=[1, 2], output_token_ids=[2], category="short")]
    with pytest.raises(ConfigError, match="nothing to measure"):
        calibrate(heads, loaded, short, source="a test")
