"""What heads get right along answers, and the calibration that follows from it."""

# Shape suffixes: N positions · K heads · C candidates per head · T tokens · E hidden

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from medusa_core.errors import ConfigError
from medusa_core.model.calibration import Calibration
from medusa_core.model.heads import DraftHeads
from medusa_core.model.loader import LoadedModel
from medusa_core.training.answers import Answer
from medusa_core.tree.search import best_observed_tree
from medusa_core.tree.topology import MAX_NODES, Choice, TreeTopology

# Positions whose draft logits are in memory at once.
_MAX_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """One place in an answer at which a step could start. path: the ranks of the right tokens, up to the first head that missed."""

    category: str
    path: Choice


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


def calibrate(
    heads: DraftHeads,
    loaded: LoadedModel,
    answers: Sequence[Answer],
    *,
    source: str,
    num_candidates: int = 10,
    progress: bool = False,
) -> tuple[Calibration, list[Position]]:
    """Measure the heads along the answers and choose the best nested tree. Answers of one token have no position to measure.

    Raises ConfigError where no answer has one.
    """
    positions: list[Position] = []
    ranks_NK = [torch.zeros(0, heads.num_heads, dtype=torch.int64)]
    for answer in tqdm(answers, desc="measuring heads", unit="answer", disable=not progress):
        if len(answer.output_token_ids) < 2:
            continue
        ranks_NK.append(observed_ranks(heads, loaded, answer, num_candidates))
        positions += [Position(category=answer.category, path=_path(row, num_candidates)) for row in ranks_NK[-1].tolist()]
    if not positions:
        raise ConfigError("No answer is longer than one token, so there is nothing to measure.", hint="Use other prompts.")
    all_NK = torch.cat(ranks_NK)
    accuracy = tuple(
        tuple(float((all_NK[:, head] == rank).float().mean()) for rank in range(num_candidates)) for head in range(heads.num_heads)
    )
    tree, acceptance = best_observed_tree((position.path for position in positions), accuracy, MAX_NODES)
    calibration = Calibration(
        rank_accuracy=accuracy, num_tokens=len(positions), source=source, tree=tree, node_acceptance=acceptance
    )
    return calibration, positions


def tokens_per_step(tree: TreeTopology, positions: Sequence[Position]) -> float:
    """Mean tokens that steps from these positions emit with this tree: the bonus, and each accepted node."""
    choices = set(tree.choices)
    num_accepted = sum(position.path[:length] in choices for position in positions for length in range(1, len(position.path) + 1))
    return 1.0 + num_accepted / len(positions)


def _path(ranks: Sequence[int], num_candidates: int) -> Choice:
    length = next((head for head, rank in enumerate(ranks) if rank == num_candidates), len(ranks))
    return tuple(ranks[:length])
