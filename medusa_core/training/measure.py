"""What heads and prompt lookup get right along answers, and the calibration that follows from it."""

# Shape suffixes: N positions · K heads · C candidates per head · T tokens · E hidden · D tokens of a lookup

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from medusa_core.errors import ConfigError
from medusa_core.model.calibration import Calibration
from medusa_core.model.heads import DraftHeads
from medusa_core.model.loader import LoadedModel
from medusa_core.model.sequential_heads import SequentialHeads
from medusa_core.scheduler.controller import tree_sizes
from medusa_core.speculation.lookup import lookup_tokens
from medusa_core.training.answers import Answer
from medusa_core.tree.merge import MAX_LOOKUP_DEPTH
from medusa_core.tree.search import best_observed_tree
from medusa_core.tree.topology import MAX_NODES, Choice, TreeTopology, lookup_chain

# Positions whose draft logits are in memory at once.
_MAX_ROWS = 256
# The tree for which steps are followed when the best one is looked for, and how often that is repeated.
_TYPICAL_NODES = 16
_TREE_ROUNDS = 3
# What drafting a further level takes, in tokens emitted in that time: sequential heads read their weights once a level. Rather less
# than it was measured to be for the demo model's on an H100: 35 to 43 us of a step of 0.9 ms that emits 2.2 tokens, which is 0.1.
_LEVEL_COST = 0.07


# A tree, and what each of its draft nodes brings.
_ValuedTree = tuple[TreeTopology, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredAnswer:
    """What is right along one answer, for each place at which a step could start, in order. paths: the ranks of the right tokens in
    the heads' lists, up to the first head that missed. lookup_lens: how many tokens prompt lookup has right."""

    category: str
    paths: tuple[Choice, ...]
    lookup_lens: tuple[int, ...]

    def steps(self, tree: TreeTopology) -> Iterator[int]:
        """Where steps with this tree start, one after the other: each as far behind the one before as that emits tokens."""
        choices, at = set(tree.choices), 0
        while at < len(self.paths):
            yield at
            at += 1 + max(_num_accepted(self.paths[at], choices), min(self.lookup_lens[at], tree.lookup_depth))


@torch.inference_mode()
def observed_ranks(heads: DraftHeads, loaded: LoadedModel, answer: Answer, num_candidates: int) -> Tensor:
    """Where the tokens that follow each root stand in the heads' lists, int64 [N, K]: the rank, or C if a token is not in it.

    Each output token but the last is a root in turn: the heads read the hidden state of the position before it, as in a step, and
    head k guesses the (k+1)-th token behind it, told those in between if it asks for them. What lies behind the end of the answer
    counts as missed. Runs the model on the attention implementation it is set to, which must be one of transformers' own (as
    `load_model` leaves it).
    """
    num_prompt, output = len(answer.prompt_token_ids), answer.output_token_ids
    num_roots = len(output) - 1
    # The last root's own hidden state is nobody's input.
    token_ids = (answer.prompt_token_ids + output)[: num_prompt + num_roots - 1]
    ids_T = torch.tensor(token_ids, device=loaded.device)
    hidden_NE = loaded.base_model(input_ids=ids_T[None], use_cache=False).last_hidden_state[0, num_prompt - 1 :]
    target_NK = torch.full((num_roots, heads.num_heads), -1, device=loaded.device)
    for head in range(min(heads.num_heads, num_roots)):
        target_NK[: num_roots - head, head] = torch.tensor(output[1 + head :], device=loaded.device)
    # the token in front of each target; behind the answer's end, where every guess is wrong, any token will do
    before_NK = torch.cat([ids_T[num_prompt:], ids_T.new_tensor(output[-2:-1])])[:, None].expand(-1, heads.num_heads).clone()
    for head in range(1, min(heads.num_heads, num_roots)):
        before_NK[:-head, head] = before_NK[head:, 0]
    embed = loaded.model.get_input_embeddings()
    ranks = []
    parts = (torch.split(rows, _MAX_ROWS) for rows in (hidden_NE, before_NK, target_NK))
    for rows_NE, tokens_NK, rows_NK in zip(*parts, strict=True):
        drafted_NKC = heads.candidates_along(rows_NE, tokens_NK, num_candidates, project=loaded.project, embed=embed)
        hits_NKC = drafted_NKC == rows_NK[..., None]
        ranks.append(torch.where(hits_NKC.any(dim=-1), hits_NKC.int().argmax(dim=-1), num_candidates))
    return torch.cat(ranks).cpu()


def observed_lookups(answer: Answer) -> tuple[int, ...]:
    """How many tokens prompt lookup has right behind each root of `observed_ranks`, up to the longest chain there is."""
    num_prompt, num_roots = len(answer.prompt_token_ids), len(answer.output_token_ids) - 1
    tokens_T = torch.tensor(answer.prompt_token_ids + answer.output_token_ids)
    lens: list[int] = []
    for num_known_N in torch.split(num_prompt + 1 + torch.arange(num_roots), _MAX_ROWS):
        found_ND = lookup_tokens(tokens_T[None], torch.zeros_like(num_known_N), num_known_N, MAX_LOOKUP_DEPTH)
        place_ND = num_known_N[:, None] + torch.arange(MAX_LOOKUP_DEPTH)
        is_right_ND = (found_ND == tokens_T[place_ND.clamp(max=len(tokens_T) - 1)]) & (place_ND < len(tokens_T))
        lens += is_right_ND.int().cumprod(dim=1).sum(dim=1).tolist()
    return tuple(lens)


def calibrate(
    heads: DraftHeads,
    loaded: LoadedModel,
    answers: Sequence[Answer],
    *,
    source: str,
    num_candidates: int = 10,
    progress: bool = False,
) -> tuple[Calibration, list[MeasuredAnswer]]:
    """Measure heads and prompt lookup along the answers and choose the best nested trees, with lookup and without. Answers of one
    token have no position to measure.

    Steps start more often where text is hard to guess, since each one skips what it got right. So a tree is chosen for the places
    at which steps with it start, not for all alike, in a few rounds.

    Raises ConfigError where no answer has a position.
    """
    measured: list[MeasuredAnswer] = []
    ranks: list[Tensor] = []
    for answer in tqdm(answers, desc="measuring heads", unit="answer", disable=not progress):
        if len(answer.output_token_ids) < 2:
            continue
        ranks.append(observed_ranks(heads, loaded, answer, num_candidates))
        paths = tuple(_path(row, num_candidates) for row in ranks[-1].tolist())
        measured.append(MeasuredAnswer(category=answer.category, paths=paths, lookup_lens=observed_lookups(answer)))
    if not measured:
        raise ConfigError("No answer is longer than one token, so there is nothing to measure.", hint="Use other prompts.")
    level_cost = _LEVEL_COST if isinstance(heads, SequentialHeads) and heads.shape.is_sequential else 0.0
    tree, acceptance = _in_rounds(measured, lambda starts: _tree_for(measured, ranks, starts, num_candidates, level_cost))
    lookup_tree, lookup_gains = _lookup_tree_for(measured, ranks, num_candidates, level_cost)
    calibration = Calibration(
        rank_accuracy=_rank_accuracy(torch.cat(ranks), num_candidates),
        num_tokens=sum(len(answer.paths) for answer in measured),
        source=source,
        tree=tree,
        node_acceptance=acceptance,
        lookup_tree=lookup_tree,
        lookup_gains=lookup_gains,
    )
    return calibration, measured


def tokens_per_step(tree: TreeTopology, answers: Sequence[MeasuredAnswer]) -> float:
    """Tokens of the answers behind their first, per step that it takes to emit them with this tree."""
    num_steps = sum(1 for answer in answers for _ in answer.steps(tree))
    return sum(len(answer.paths) for answer in answers) / num_steps


def _in_rounds(measured: Sequence[MeasuredAnswer], choose: Callable[[Sequence[Sequence[int]]], _ValuedTree]) -> _ValuedTree:
    """What `choose` makes of the places at which steps with its own tree start, by answer."""
    chosen = choose([range(len(answer.paths)) for answer in measured])
    for _ in range(_TREE_ROUNDS):
        typical = chosen[0].prefix(_TYPICAL_NODES)
        chosen = choose([list(answer.steps(typical)) for answer in measured])
    return chosen


def _tree_for(
    measured: Sequence[MeasuredAnswer],
    ranks: Sequence[Tensor],
    starts: Sequence[Sequence[int]],
    num_candidates: int,
    level_cost: float,
) -> _ValuedTree:
    """The best tree for steps that start at these places of each answer, and how often its nodes are accepted there."""
    paths = (answer.paths[at] for answer, places in zip(measured, starts, strict=True) for at in places)
    ranks_NK = torch.cat([ranks_NK[list(places)] for ranks_NK, places in zip(ranks, starts, strict=True)])
    return best_observed_tree(paths, _rank_accuracy(ranks_NK, num_candidates), MAX_NODES, level_cost=level_cost)


def _lookup_tree_for(
    measured: Sequence[MeasuredAnswer], ranks: Sequence[Tensor], num_candidates: int, level_cost: float
) -> _ValuedTree:
    """The best tree with prompt lookup, and the gains of its nodes.

    Heads are there for what lookup does not have, so their nodes are in the order that is best for all places where it misses. From
    one size of steps to the next, the tree grows by the division between heads and chain that needs the fewest steps: a chain may
    pay only in the whole. Gains are alike in between.
    """
    places = [range(len(answer.paths)) for answer in measured]
    missed = [[at for at, length in enumerate(answer.lookup_lens) if length == 0] for answer in measured]
    heads_tree, _ = _tree_for(measured, ranks, missed if any(missed) else places, num_candidates, level_cost)
    heads, chain = heads_tree.choices, lookup_chain(MAX_LOOKUP_DEPTH)
    tree, expected = TreeTopology(()), 1.0
    gains: list[float] = []
    for size in tree_sizes(min(1 + len(heads) + len(chain), MAX_NODES))[1:]:
        num_used, depth, num_more = tree.num_nodes - 1 - tree.lookup_depth, tree.lookup_depth, size - tree.num_nodes
        divisions = [
            TreeTopology((*tree.choices, *heads[num_used : num_used + num_more - num_chain], *chain[depth : depth + num_chain]))
            for num_chain in range(num_more + 1)
            if num_used + num_more - num_chain <= len(heads) and depth + num_chain <= len(chain)
        ]
        tree = max(divisions, key=lambda division: tokens_per_step(division, measured))
        before, expected = expected, tokens_per_step(tree, measured)
        gains += [max(expected - before, 0.0) / num_more] * num_more
    return tree, tuple(gains)


def _rank_accuracy(ranks_NK: Tensor, num_candidates: int) -> tuple[tuple[float, ...], ...]:
    """How often the token of each rank was right, [K][C]."""
    return tuple(
        tuple(float((head_N == rank).float().mean()) for rank in range(num_candidates)) for head_N in ranks_NK.unbind(dim=1)
    )


def _num_accepted(path: Choice, choices: Set[Choice]) -> int:
    return next((length for length in range(len(path)) if path[: length + 1] not in choices), len(path))


def _path(ranks: Sequence[int], num_candidates: int) -> Choice:
    length = next((head for head, rank in enumerate(ranks) if rank == num_candidates), len(ranks))
    return tuple(ranks[:length])
