"""The masks of trees against matchers that are sent down every path by themselves."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
from llguidance import LLMatcher

from medusa_core.grammar.compiler import GrammarCompiler, vocabulary
from medusa_core.grammar.lanes import GrammarLanes
from medusa_core.grammar.trees import TreeMasks, num_mask_rows
from medusa_core.outputs import FinishReason
from medusa_core.params import Grammar, SamplingParams
from medusa_core.plan import LaneJoin, LaneResult, StepPlan
from tests.grammars import EOS_ID, PIECES, VOCAB_SIZE, tiny_compiler, tiny_tokenizer

GRAMMARS = [
    Grammar(kind="regex", text=r"(cat|dog)?[a-c]{2,6}(12)*"),
    Grammar(kind="choice", text=json.dumps(["abc", "abcat", "cat", "ab"])),
    Grammar(kind="json_schema", text=json.dumps({"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}})),
]
PROMPT = [5, 6]
COMPILER = tiny_compiler()


def join(lane: int, grammar: Grammar, emitted: list[int], **params: object) -> LaneJoin:
    return LaneJoin(
        lane=lane,
        uid=100 + lane,
        token_ids=PROMPT + emitted,
        num_prompt_tokens=len(PROMPT),
        num_computed_tokens=0,
        max_total_tokens=100,
        noise_key=0,
        params=SamplingParams(grammar=grammar, **params),
        block_ids=[],
    )


def make_lanes(*joins: LaneJoin) -> GrammarLanes:
    lanes = GrammarLanes(tiny_compiler(), num_tokens=VOCAB_SIZE, eos_token_ids=[EOS_ID])
    lanes.apply(StepPlan(step_id=0, joins=list(joins)))
    return lanes


def masks_of(masks: TreeMasks) -> np.ndarray:
    """Of each node, int32 [B, N, W]; zeros where there is none."""
    return np.where(masks.row_BN[..., None] < 0, 0, masks.mask_KW[masks.row_BN.clip(0)])


def allowed(mask_W: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little")).tolist())


def matcher_behind(grammar: Grammar, token_ids: list[int]) -> LLMatcher | None:
    """None where the grammar does not allow the tokens."""
    matcher = COMPILER.compile(grammar)
    return matcher if matcher.try_consume_tokens(token_ids) == len(token_ids) else None


def random_tree(rng: random.Random, num_nodes: int) -> list[int]:
    return [-1, *(rng.randrange(node) for node in range(1, num_nodes))]


def path_to(node: int, parents: list[int], token_ids: list[int]) -> list[int]:
    path = []
    while node > 0:
        path.append(token_ids[node])
        node = parents[node]
    return path[::-1]


@pytest.mark.parametrize("seed", range(4))
def test_every_node_that_can_be_reached_has_the_mask_of_its_path(seed):
    rng = random.Random(seed)
    lanes = make_lanes(*(join(lane, grammar, []) for lane, grammar in enumerate(GRAMMARS)))
    emitted: list[list[int]] = [[] for _ in GRAMMARS]
    num_filled = num_refused = 0
    for _ in range(6):
        parents = random_tree(rng, 24)
        tokens_BN = np.zeros((len(GRAMMARS), 24), dtype=np.int64)
        for lane, grammar in enumerate(GRAMMARS):
            for node in range(1, 24):
                before = matcher_behind(grammar, emitted[lane] + path_to(parents[node], parents, tokens_BN[lane].tolist()))
                # mostly what the grammar allows, so that the tree is not cut at once
                options = sorted(allowed(np.frombuffer(before.compute_bitmask(), dtype=np.int32))) if before else []
                tokens_BN[lane, node] = rng.choice(options) if options and rng.random() < 0.8 else rng.randrange(4, 90)
        masks_BNW = masks_of(lanes.fill([0, 1, 2], tokens_BN, parents, budget_s=1e9))
        for lane, grammar in enumerate(GRAMMARS):
            for node in range(24):
                path = path_to(node, parents, tokens_BN[lane].tolist())
                matcher = matcher_behind(grammar, emitted[lane] + path)
                if matcher is None or EOS_ID in path:
                    assert not masks_BNW[lane, node].any()
                    num_refused += matcher is None
                else:
                    expected = set(
                        np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
                    )
                    assert allowed(masks_BNW[lane, node]) == expected
                    num_filled += 1
            # go on with what is allowed at the root
            token_id = min(allowed(masks_BNW[lane, 0]) - {EOS_ID}, key=lambda _: rng.random(), default=None)
            if token_id is not None:
                assert lanes.take(LaneResult(lane=lane, uid=100 + lane, token_ids=[token_id])).finish_reason is None
                emitted[lane].append(token_id)
    assert num_filled > 80
    assert num_refused > 20


def test_without_time_only_roots_have_masks():
    encode = tiny_tokenizer().encode
    lanes = make_lanes(join(0, GRAMMARS[0], []), join(1, GRAMMARS[0], encode("cat")))
    a, x, c = (encode(letter)[0] for letter in "axc")
    tokens_BN = np.array([[0, a, x, c, EOS_ID]] * 2)
    masks = lanes.fill([0, 1], tokens_BN, [-1, 0, 0, 1, 0], budget_s=-1.0)
    masks_BNW = masks_of(masks)
    assert masks_BNW.any(axis=2).tolist() == [[True, False, False, False, False]] * 2
    # what has no mask must not be descended to
    assert (masks.row_BN >= 0).tolist() == [[True, False, False, False, False]] * 2
    full_BNW = masks_of(lanes.fill([0, 1], tokens_BN, [-1, 0, 0, 1, 0], budget_s=1e9))
    assert (full_BNW[:, 0] == masks_BNW[:, 0]).all()
    assert full_BNW.any(axis=2).tolist() == [[True, True, False, True, False]] * 2


def test_masks_are_written_where_they_are_wanted():
    lanes = make_lanes(*(join(lane, grammar, []) for lane, grammar in enumerate(GRAMMARS)))
    parents = random_tree(random.Random(0), 24)
    tokens_BN = np.random.default_rng(0).integers(4, 90, (3, 24))
    expected_BNW = masks_of(lanes.fill([0, 1, 2], tokens_BN, parents, budget_s=1e9))
    num_rows = 3 * num_mask_rows(tuple(parents))
    mask_KW = np.zeros((num_rows + 1, lanes.num_mask_words), dtype=np.int32)
    masks = lanes.fill([0, 1, 2], tokens_BN, parents, budget_s=1e9, mask_KW=mask_KW)
    assert masks.mask_KW is mask_KW
    assert (masks_of(masks) == expected_BNW).all()
    assert masks.row_BN.max() < num_rows
    assert not mask_KW[num_rows].any()


STRING_OR_OBJECT = {"anyOf": [{"type": "string"}, {"type": "object"}]}


@pytest.mark.parametrize(
    ("schema", "emitted"),
    [
        ({"type": "object"}, '{"a":'),
        ({"type": "object", "properties": {"a": STRING_OR_OBJECT}}, '{"a":'),
        ({"type": "array", "items": STRING_OR_OBJECT}, "["),
    ],
)
def test_a_path_that_was_not_taken_leaves_nothing_behind(schema, emitted):
    """llguidance's own way back would keep the mask behind the draft, a string, and take it for that of the object's key."""
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    before = [PIECES.index(letter) for letter in emitted]
    lanes = make_lanes(join(0, grammar, before))
    string, obj = PIECES.index('Ġ"'), PIECES.index('{"')
    assert masks_of(lanes.fill([0], np.array([[0, string]]), [-1, 0], budget_s=1e9)).any(axis=2).all()
    lanes.take(LaneResult(lane=0, uid=100, token_ids=[obj]))
    mask_W = masks_of(lanes.fill([0], np.zeros((1, 1), dtype=np.int64), [-1]))[0, 0]
    matcher = matcher_behind(grammar, [*before, obj])
    assert matcher is not None
    assert (mask_W == np.frombuffer(matcher.compute_bitmask(), dtype=np.int32)).all()
    assert PIECES.index('":') in allowed(mask_W)


def test_a_request_leaves_nothing_behind_for_the_next_one_with_its_grammar():
    text = 'start: WS? (STR | "{" KEY ":" STR "}")\nWS: " "\nSTR: /"[a-z]*"/\nKEY: /"[a-z]*"/'
    grammar = Grammar(kind="cfg", text=text)
    lanes = make_lanes(join(0, grammar, []))
    one_node = np.zeros((1, 1), dtype=np.int64)
    for piece in ('Ġ"', "a"):
        lanes.fill([0], one_node, [-1])
        lanes.take(LaneResult(lane=0, uid=100, token_ids=[PIECES.index(piece)]))
    lanes.fill([0], one_node, [-1])
    lanes.apply(StepPlan(step_id=1, leaves=[0], joins=[join(1, grammar, [PIECES.index('{"')])]))
    mask_W = masks_of(lanes.fill([1], one_node, [-1]))[0, 0]
    matcher = matcher_behind(grammar, [PIECES.index('{"')])
    assert matcher is not None
    assert (mask_W == np.frombuffer(matcher.compute_bitmask(), dtype=np.int32)).all()


def test_a_node_whose_token_is_refused_though_it_was_allowed_has_no_mask():
    """llguidance leaves what there was in its place."""
    grammar = Grammar(kind="cfg", text='%llguidance {"allow_invalid_utf8": true}\nstart: "a" /(?s:.)*/ "cat"')
    lanes = make_lanes(join(0, grammar, []))
    letter, special = PIECES.index("a"), PIECES.index("<pad>")
    mask_KW = np.full((3, lanes.num_mask_words), -1, dtype=np.int32)
    masks = lanes.fill([0], np.array([[0, letter, special]]), [-1, 0, 1], budget_s=1e9, mask_KW=mask_KW)
    assert PIECES.index("<pad>") in allowed(masks.mask_KW[1])
    assert masks.row_BN.tolist() == [[0, 1, -1]]


@pytest.mark.parametrize("num_tokens", [64, 97])
def test_tokens_beyond_the_logits_are_no_way_to_go_on(num_tokens):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x0>", "<x1>"]})
    assert len(tokenizer) == 98
    compiler = GrammarCompiler(lambda: vocabulary(tokenizer, num_tokens, [EOS_ID]))
    lanes = GrammarLanes(compiler, num_tokens=num_tokens, eos_token_ids=[EOS_ID])
    grammar = Grammar(kind="cfg", text='start: "a" <x1> "b"')
    lanes.apply(StepPlan(step_id=0, joins=[join(0, grammar, tokenizer.encode("a"))]))
    assert lanes.num_mask_words > num_tokens // 32
    lanes.fill([0], np.zeros((1, 1), dtype=np.int64), [-1])
    assert lanes.take(LaneResult(lane=0, uid=100, token_ids=[7])).finish_reason is FinishReason.GRAMMAR


def test_a_request_that_comes_back_goes_on_where_it_was():
    emitted = tiny_tokenizer().encode("dogab")
    stepwise = make_lanes(join(0, GRAMMARS[0], []))
    for token_id in emitted:
        stepwise.take(LaneResult(lane=0, uid=100, token_ids=[token_id]))
    back = make_lanes(join(0, GRAMMARS[0], emitted))
    one_node = np.zeros((1, 1), dtype=np.int64)
    assert (masks_of(stepwise.fill([0], one_node, [-1])) == masks_of(back.fill([0], one_node, [-1]))).all()
    assert EOS_ID in allowed(masks_of(back.fill([0], one_node, [-1]))[0, 0])


def test_results_of_a_lane_that_was_given_away_are_not_taken():
    lanes = make_lanes(join(0, GRAMMARS[0], []))
    one_node = np.zeros((1, 1), dtype=np.int64)
    before = masks_of(lanes.fill([0], one_node, [-1]))
    late = LaneResult(lane=0, uid=7, token_ids=tiny_tokenizer().encode("cat"))
    assert lanes.take(late) is late
    assert (masks_of(lanes.fill([0], one_node, [-1])) == before).all()
    lanes.apply(StepPlan(step_id=1, leaves=[0]))
    assert 0 not in lanes
    assert lanes.take(late) is late


def test_ends_wait_for_min_tokens_unless_nothing_else_is_allowed():
    one_node = np.zeros((1, 1), dtype=np.int64)
    encode = tiny_tokenizer().encode
    stop_id = encode("c")[0]

    def mask_behind(text: str, grammar: Grammar, min_tokens: int) -> set[int]:
        lanes = make_lanes(join(0, grammar, encode(text), min_tokens=min_tokens, stop_token_ids=(stop_id,)))
        return allowed(masks_of(lanes.fill([0], one_node, [-1]))[0, 0])

    free = mask_behind("ab", GRAMMARS[0], 0)
    assert {EOS_ID, stop_id} < free
    num_tokens = len(encode("ab"))
    assert mask_behind("ab", GRAMMARS[0], num_tokens) == free
    assert mask_behind("ab", GRAMMARS[0], num_tokens + 1) == free - {EOS_ID, stop_id}
    assert mask_behind("abcat", GRAMMARS[1], 50) == {EOS_ID}


def test_nodes_count_for_min_tokens():
    a = tiny_tokenizer().encode("a")[0]
    grammar = Grammar(kind="regex", text="a{1,9}")
    lanes = make_lanes(join(0, dataclasses.replace(grammar), [], min_tokens=2))
    masks_BNW = masks_of(lanes.fill([0], np.array([[0, a, a]]), [-1, 0, 1], budget_s=1e9))
    assert [EOS_ID in allowed(mask_W) for mask_W in masks_BNW[0]] == [False, False, True]


# Too many properties to keep apart, which shows behind the first quote.
TOO_LARGE = Grammar(
    kind="json_schema",
    text=json.dumps({"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(600)}}),
)


def test_a_grammar_that_gets_too_large_on_the_way_ends_its_own_request():
    d_only = Grammar(kind="regex", text="d{1,99}")
    lanes = make_lanes(join(0, TOO_LARGE, []), join(1, d_only, []))
    brace, quote, d = (tiny_tokenizer().encode(letter)[0] for letter in '{"d')
    tree = np.array([[0, brace, quote], [0, d, d]])
    for _ in range(3):
        # on a path of the tree it harms nobody
        masks_BNW = masks_of(lanes.fill([0, 1], tree, [-1, 0, 1], budget_s=1e9))
        # the mask behind the brace is what gets too large, and nothing is looked at below
        assert masks_BNW.any(axis=2).tolist() == [[True, False, False], [True] * 3]
    results = []
    for token_id in (brace, quote, quote):
        results.append(lanes.take(LaneResult(lane=0, uid=100, token_ids=[token_id])))
        assert lanes.take(LaneResult(lane=1, uid=101, token_ids=[d])).finish_reason is None
        masks_BNW = masks_of(lanes.fill([0, 1], tree, [-1, 0, 0], budget_s=1e9))
        assert d in allowed(masks_BNW[1, 0])
    assert (results[-1].token_ids, results[-1].finish_reason) == ([], FinishReason.GRAMMAR)


@pytest.mark.parametrize(("grammar", "is_lent_again"), [(GRAMMARS[2], True), (TOO_LARGE, False)])
def test_what_a_failed_lane_was_lent_is_lent_to_nobody_else(grammar, is_lent_again):
    compiler = tiny_compiler()
    lent = []
    lend = compiler.lend
    compiler.lend = lambda *args, **options: lent.append(lend(*args, **options)) or lent[-1]
    lanes = GrammarLanes(compiler, num_tokens=VOCAB_SIZE, eos_token_ids=[EOS_ID])
    lanes.apply(StepPlan(step_id=0, joins=[join(0, grammar, [])]))
    brace, quote = (tiny_tokenizer().encode(letter)[0] for letter in '{"')
    lanes.fill([0], np.array([[0, brace, quote]]), [-1, 0, 1], budget_s=1e9)
    lanes.apply(StepPlan(step_id=1, leaves=[0]))
    assert (lend(grammar) in lent) == is_lent_again


@pytest.mark.parametrize("end", [{"token_ids": [5]}, {"token_ids": [EOS_ID], "finish_reason": FinishReason.STOP}])
def test_what_a_failed_lane_draws_is_told_to_nobody_though_it_is_preempted_meanwhile(end):
    brace, quote = (tiny_tokenizer().encode(letter)[0] for letter in '{"')
    lanes = make_lanes(join(0, TOO_LARGE, [brace, quote]))
    masks_BNW = masks_of(lanes.fill([0], np.zeros((1, 1), dtype=np.int64), [-1]))
    assert masks_BNW.all()
    lanes.apply(StepPlan(step_id=1, leaves=[0]))
    result = lanes.take(LaneResult(lane=0, uid=100, **end))
    assert (result.token_ids, result.finish_reason) == ([], FinishReason.GRAMMAR)
    # Its lane may be another's by then, and so may its id once it is over.
    assert lanes.take(LaneResult(lane=0, uid=100, **end)).token_ids == end["token_ids"]
