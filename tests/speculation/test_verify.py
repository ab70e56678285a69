"""The walk emits what plain decoding would, with any tree; the cut ends lanes token by token."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from medusa_core.params import SamplingParams
from medusa_core.sampling.sampler import draw
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.verify import FINISHED_LENGTH, FINISHED_STOP, NOT_FINISHED, Walk, credited_nodes, cut_walk, walk_tree
from medusa_core.tree.topology import TreeTopology
from tests import options
from tests.sampling.test_sampler import make_rows, on_device

VOCAB = 6
TREES = [
    TreeTopology.chain(0),
    TreeTopology.chain(3),
    TreeTopology.from_choices([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]),
    TreeTopology.from_choices([(i,) for i in range(5)] + [(i, j) for i in range(3) for j in range(4)]),
]


def toy_logits(context: tuple[int, ...]) -> torch.Tensor:
    """A model of order 2: logits [V] as a fixed function of the last two tokens."""
    seed = 7919 * context[-1] + 104729 * context[-2] + 13
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5


def verify_once(context, topology, draft, params, keys, index):
    """One verification step from `context` for many noise keys at once. `draft[depth][rank]` are the heads' tokens."""
    tree = DeviceTree.create(topology, torch.device(options.device))
    tokens = [context[-1], *(draft[len(choice) - 1][choice[-1]] for choice in topology.choices)]
    paths = [()] + [tuple(draft[d][rank] for d, rank in enumerate(choice)) for choice in topology.choices]
    logits = torch.stack([toy_logits((*context, *path)) for path in paths]).to(options.device)
    num = len(keys)
    rows = make_rows([params] * num, keys=keys)
    return walk_tree(logits.expand(num, -1, -1), on_device([tokens] * num), tree, rows, on_device([index] * num))


def plain_decode(context, params, key, index, num_tokens):
    out = []
    for step in range(num_tokens):
        rows = make_rows([params], keys=[key])
        out.append(int(draw(toy_logits((*context, *out)).unsqueeze(0).to(options.device), rows, on_device([index + step]))))
    return out


drafts = st.lists(st.permutations(range(VOCAB)), min_size=3, max_size=3)
sampling = st.sampled_from(
    [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(temperature=0.6, top_p=0.9),
        SamplingParams(temperature=1.4, top_k=3),
        SamplingParams(min_p=0.2),
        SamplingParams(min_tokens=5),
    ]
)


@settings(deadline=None, max_examples=80)
@given(drafts, sampling, st.sampled_from(TREES), st.integers(0, 2**40), st.integers(0, 9))
def test_any_tree_gives_the_tokens_of_plain_decoding(draft, params, topology, key, index):
    """Token for token, seeded: speculation on == off."""
    context = (1, 4)
    walk = verify_once(context, topology, draft, params, [key, key + 1], index)
    for lane in range(2):
        length = int(walk.length_B[lane])
        tokens = walk.token_ids_BL[lane].tolist()
        assert tokens[:length] == plain_decode(context, params, key + lane, index, length)
        assert tokens[length:] == [-1] * (len(tokens) - length)


def test_a_perfect_draft_is_accepted_whole_and_a_wrong_one_not_at_all():
    context, params = (2, 3), SamplingParams(temperature=0.0)
    truth = plain_decode(context, params, 0, 0, 4)
    perfect = [[token] for token in truth]
    assert verify_once(context, TreeTopology.chain(3), perfect, params, [0], 0).token_ids_BL.tolist() == [truth]
    wrong = [[(token + 1) % VOCAB] for token in truth]
    assert verify_once(context, TreeTopology.chain(3), wrong, params, [0], 0).length_B.tolist() == [1]


def pair_probabilities(context):
    first = toy_logits(context).double().softmax(0)
    return {
        (a, b): float(first[a] * toy_logits((*context, a)).double().softmax(0)[b])
        for a, b in itertools.product(range(VOCAB), repeat=2)
    }


def test_pairs_of_tokens_have_the_models_distribution():
    """Chi-square over all 36 pairs, 20,000 keys: each pair comes from one or two steps, whatever the tree accepted."""
    context, params, num = (0, 5), SamplingParams(), 20_000
    draft = [list(range(VOCAB))] * 3
    walk = verify_once(context, TREES[2], draft, params, list(range(num)), 3)
    pairs = dict.fromkeys(itertools.product(range(VOCAB), repeat=2), 0)
    for lane, tokens in enumerate(walk.token_ids_BL.tolist()):
        second = tokens[1] if tokens[1] >= 0 else plain_decode((*context, tokens[0]), params, lane, 4, 1)[0]
        pairs[tokens[0], second] += 1
    expected = pair_probabilities(context)
    assert chisquare(list(pairs.values()), [expected[pair] * num for pair in pairs]).pvalue > 1e-4


def typical_acceptance(context, draft, generator):
    """The Medusa paper's lossy rule at its simplest: take the draft if it is likely enough, else sample. Not ours."""
    probabilities = toy_logits(context).softmax(0)
    entropy = -(probabilities * probabilities.log()).sum()
    if probabilities[draft] > min(0.09, 0.3 * float(torch.exp(-entropy))):
        return draft
    return int(torch.multinomial(probabilities, 1, generator=generator))


def test_the_chi_square_test_rejects_typical_acceptance():
    """Negative control: the same statistic must see a rule that is not lossless."""
    generator = torch.Generator().manual_seed(0)
    context, num = (0, 5), 2_000
    counts = torch.bincount(torch.tensor([typical_acceptance(context, 2, generator) for _ in range(num)]), minlength=VOCAB)
    expected = toy_logits(context).double().softmax(0) * num
    assert chisquare(counts.tolist(), expected.tolist()).pvalue < 1e-6


def make_walk(tokens: list[list[int]], width: int) -> Walk:
    padded = torch.tensor([row + [-1] * (width - len(row)) for row in tokens])
    return Walk(padded, torch.zeros_like(padded), torch.zeros_like(padded), (padded >= 0).sum(1))


@pytest.mark.parametrize(
    ("tokens", "room", "is_finished", "kept", "code"),
    [
        ([5, 6, 7], 9, False, 3, NOT_FINISHED),
        ([5, 2, 7], 9, False, 2, FINISHED_STOP),
        ([2], 9, False, 1, FINISHED_STOP),
        ([5, 6, 7], 2, False, 2, FINISHED_LENGTH),
        ([5, 6], 2, False, 2, FINISHED_LENGTH),
        ([5, 2, 7], 2, False, 2, FINISHED_STOP),  # a stop token at the limit counts as a stop
        ([5, 6, 2], 2, False, 2, FINISHED_LENGTH),  # a stop token beyond the limit was never emitted
        ([5, 2], 0, True, 0, NOT_FINISHED),
    ],
)
def test_cut(tokens, room, is_finished, kept, code):
    stop_ids = torch.tensor([[2, 9, -1]])
    num_kept, finish = cut_walk(make_walk([tokens], 4), stop_ids, torch.tensor([room]), torch.tensor([is_finished]))
    assert (num_kept.tolist(), finish.tolist()) == ([kept], [code])


def test_the_credit_for_tokens_kept_is_a_bit_for_each_node():
    walk = make_walk([[5, 6, 7], [5], [5, 6, 7]], 4)
    walk.credit_BL = torch.tensor([[1, 63, -1, -1], [-1, -1, -1, -1], [2, 4, 6, -1]])
    assert credited_nodes(walk, torch.tensor([3, 1, 1])).tolist() == [2 - 2**63, 0, 4]


def test_a_head_has_the_credit_for_what_the_lookup_offers_too():
    """Whichever of the two comes first in the tree; the lookup has it for what no head offers."""
    context, params = (2, 3), SamplingParams(temperature=0.0)
    first, second = plain_decode(context, params, 0, 0, 2)
    for choices, credit in (
        ([(-1,), (0,), (-1, -1)], [2, 3]),
        ([(1,), (-1,), (-1, -1), (0,), (0, 0)], [4, 5]),
        ([(1,), (-1,), (-1, -1)], [2, 3]),
    ):
        # rank -1 is the last of these lists: what the lookup offers
        draft = [[first, VOCAB, first], [second, VOCAB, second]]
        walk = verify_once(context, TreeTopology.from_choices(choices), draft, params, [0], 0)
        assert walk.length_B.tolist() == [3]
        assert walk.credit_BL.tolist() == [[*credit, -1]]
