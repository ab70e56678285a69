"""Do these heads predict this model? One forward pass at load tells heads that fit from heads that only have the right shapes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor
from transformers import AutoTokenizer

from medusa_core.errors import ModelLoadError
from medusa_core.model.heads import DraftHeads
from medusa_core.model.loader import LoadedModel

logger = logging.getLogger(__name__)

_MIN_TOP1 = 0.10
_NUM_CANDIDATES = 10
_MAX_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Per head: share of positions at which its best guess, or one of its ten best, was the model's own token.

    num_positions: positions counted, per head; 0 makes the shares 0.
    """

    top1: tuple[float, ...]
    top10: tuple[float, ...]
    num_positions: tuple[int, ...]


def probe_token_ids(loaded: LoadedModel, *, trust_remote_code: bool = False) -> list[int]:
    """A bundled passage, chosen to be predictable, in the model's own tokens.

    Raises ModelLoadError for a folder without a tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(loaded.folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"The tokenizer in {loaded.folder} cannot be read ({error}).") from error
    text = (resources.files("medusa_core") / "assets" / "probe.txt").read_text()
    token_ids: list[int] = tokenizer(text)["input_ids"]
    return token_ids[: min(_MAX_TOKENS, loaded.max_model_len)]


@torch.inference_mode()
def probe_heads(heads: DraftHeads, loaded: LoadedModel, token_ids: list[int]) -> ProbeResult:
    """Accuracy of the heads along `token_ids`, where that text follows the model's greedy choice; warns when it is near zero.

    Runs the model once, on the attention implementation it is set to, which must be one of transformers' own (as `load_model`
    leaves it).
    """
    ids_T = torch.tensor(token_ids, device=loaded.device)
    hidden_TE = loaded.base_model(input_ids=ids_T[None], use_cache=False).last_hidden_state[0]
    greedy_T = loaded.project(hidden_TE).argmax(dim=-1)
    before_TK = torch.stack([ids_T.roll(-1 - head) for head in range(heads.num_heads)], dim=1)
    drafted_TKC = heads.candidates_along(
        hidden_TE, before_TK, _NUM_CANDIDATES, project=loaded.project, embed=loaded.model.get_input_embeddings()
    )
    shares = [_head_accuracy(drafted_TKC[:, head], ids_T, greedy_T, head) for head in range(heads.num_heads)]
    top1, top10, num_positions = zip(*shares, strict=True)
    result = ProbeResult(top1=top1, top10=top10, num_positions=num_positions)
    if result.top1[0] < _MIN_TOP1 and num_positions[0]:
        logger.warning(
            "Head 1 guesses %.1f %% of the model's tokens: these heads hardly fit this model, and speculation will not pay.",
            100 * result.top1[0],
        )
    logger.info("Heads' accuracy (top 1 / top 10): %s.", ", ".join(f"{a:.2f} / {b:.2f}" for a, b in zip(top1, top10, strict=True)))
    return result


def _head_accuracy(drafted_TC: Tensor, ids_T: Tensor, greedy_T: Tensor, head: int) -> tuple[float, float, int]:
    """Top-1 share, top-C share and positions counted of one head.

    Head k at position t guesses token t+2+k, which greedy_T[t+1+k] is if the text up to t+1+k is what the model would have said.
    """
    # none where the context is shorter than the head's reach
    num_positions = max(len(ids_T) - 1 - head, 0)
    follows_T = torch.zeros(len(ids_T), dtype=torch.bool, device=ids_T.device)
    follows_T[:-1] = ids_T[1:] == greedy_T[:-1]
    is_counted_T = torch.stack([follows_T[i : i + num_positions] for i in range(head + 1)]).all(dim=0)
    hits_TC = drafted_TC[:num_positions] == greedy_T[1 + head :, None]
    counted_TC = hits_TC[is_counted_T].float()
    num_counted = len(counted_TC)
    if num_counted == 0:
        return 0.0, 0.0, 0
    return counted_TC[:, 0].mean().item(), counted_TC.any(dim=1).float().mean().item(), num_counted
