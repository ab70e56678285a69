"""Heads learn on a base model that stays as it is (Medusa-1), and then together with it, if that is asked for (Medusa-2).

Rows of packed documents go through the base model; its hidden states are what heads read, and its own logits what they are compared
with (arXiv:2401.10774, section 3.1). In the joint stage the model has a loss of its own beside the heads', and the logits are those
of the model as it was before (self-distillation, section 3.2). A run can be stopped between any two updates and goes on from its
checkpoint bit for bit.
"""

# Shape suffixes: T tokens of a row · N positions with a target · K heads · E hidden · V draft vocabulary

from __future__ import annotations

import math
import pickle
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from medusa_core.errors import ConfigError
from medusa_core.model.loader import LoadedModel
from medusa_core.model.projection import Projection
from medusa_core.model.sequential_heads import SequentialHeads, draft_ids
from medusa_core.training.losses import head_loss
from medusa_core.training.packing import NO_TARGET, Row
from medusa_core.training.plan import Progress, TrainingPlan
from medusa_core.training.tuned_base import TunedBase, read_frozen

# Logits in memory at once, and as many gradients: positions times the draft vocabulary.
_MAX_LOGITS = 2**27
# Tokens that go through the base model at once: enough that launching its kernels takes no longer than they do.
_MAX_READ_TOKENS = 16_384
# The same with gradients: what every layer computed stays in memory.
_MAX_JOINT_TOKENS = 8192
_MAX_GRADIENT_NORM = 1.0
# Of each weight of the base model, to tell another model of the same name.
_SAMPLED_WEIGHTS = 1024


@dataclass(frozen=True, slots=True)
class _Text:
    """Rows one behind the other, read by the base model. token_ids_T, target_TK: on the CPU; see `Row`. hidden_TE: behind the final
    norm; in the joint stage its gradient is collected. original_TE: the same, of the model as it was before training."""

    token_ids_T: Tensor
    hidden_TE: Tensor
    original_TE: Tensor
    target_TK: Tensor

    def token_before(self, head: int, at_N: Tensor) -> Tensor:
        """The token in front of the one that a head guesses from these positions, int64 [N]; where it has none to guess, any."""
        return self.token_ids_T[(at_N + 1 + head).clamp(max=len(self.token_ids_T) - 1)]


class Trainer:
    """One run over `rows`. Checks nothing of how they were made, but that a checkpoint belongs to the same ones.

    token_map_V: base ids of the draft vocabulary; None drafts from the whole one.
    """

    def __init__(self, loaded: LoadedModel, rows: Sequence[Row], plan: TrainingPlan, token_map_V: Tensor | None) -> None:
        if not rows:
            raise ConfigError("There is nothing to learn from: no row of tokens.", hint="Give more data, or longer texts.")
        if not any((row.targets(plan.shape.num_heads) != NO_TARGET).any() for row in rows):
            raise ConfigError(
                "There is nothing to learn from: all texts are too short.", hint="Heads guess from the third token on."
            )
        self.plan = plan
        self._loaded = loaded
        self._rows = rows
        self._draft_ids = draft_ids(token_map_V, loaded.vocab_size, outside=NO_TARGET).cpu()
        self._projection: Projection = loaded.project if token_map_V is None else loaded.project.restricted_to(token_map_V)
        self._embed = loaded.model.get_input_embeddings()
        self.heads = self._new_heads(token_map_V)
        self._average = AveragedModel(self.heads, avg_fn=self._moving_average)
        # of the model as it was, whatever becomes of it
        self._written_for = self._fingerprint()
        self.base: TunedBase | None = None
        groups: list[dict[str, Any]] = [{"params": list(self.heads.parameters()), "lr": plan.learning_rate}]
        factors: list[Callable[[int], float]] = [self._learning_rate_factor]
        if plan.joint is not None:
            self.base = TunedBase(loaded, plan.joint, plan.seed)
            groups.append({"params": self.base.parameters, "lr": plan.joint.learning_rate})
            factors.append(self._base_learning_rate_factor)
        self._trained = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, factors)
        self.num_updates_done = 0

    @property
    def num_updates(self) -> int:
        num_joint_epochs = 0 if self.plan.joint is None else self.plan.joint.epochs
        return self._updates_per_epoch * (self.plan.epochs + num_joint_epochs)

    @property
    def num_updates_alone(self) -> int:
        """Updates in which heads learn alone."""
        return self._updates_per_epoch * self.plan.epochs

    @property
    def trained(self) -> SequentialHeads:
        """What is exported: the moving average, if there is one."""
        averaged = self._average.module
        assert isinstance(averaged, SequentialHeads)
        return averaged if self.plan.ema_decay > 0.0 and self.num_updates_done else self.heads

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """Updates until the end, or until `should_stop` says so between two of them."""
        start_s = time.perf_counter()
        for update in range(self.num_updates_done, self.num_updates):
            if should_stop():
                return
            loss = self._learn(self._rows_of(update))
            if not math.isfinite(loss):
                raise ConfigError(
                    f"The loss of update {update + 1} is {loss}.", hint="Lower --learning-rate, or use --dtype float32."
                )
            norm = float(torch.nn.utils.clip_grad_norm_(self._trained, _MAX_GRADIENT_NORM))
            if not math.isfinite(norm):
                raise ConfigError(f"The gradient of update {update + 1} is {norm}.", hint="Lower the learning rates.")
            learning_rate = float(self._schedule.get_last_lr()[0])
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
            self._average.update_parameters(self.heads)
            self.num_updates_done = update + 1
            yield Progress(
                update=self.num_updates_done,
                num_updates=self.num_updates,
                loss=loss,
                learning_rate=learning_rate,
                num_tokens=self._num_rows_done() * len(self._rows[0].token_ids_T),
                seconds=time.perf_counter() - start_s,
            )

    def save(self, path: Path) -> None:
        """Everything needed to go on. The file of an earlier checkpoint is replaced as a whole."""
        state = {
            "fingerprint": self._written_for,
            "num_updates_done": self.num_updates_done,
            "heads": self.heads.state_dict(),
            "average": self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "base": None if self.base is None else self.base.state_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ConfigError for one of another plan, model or data, or a file that is none."""
        try:
            state: dict[str, Any] = torch.load(path, map_location=self._loaded.device, weights_only=True)
            written = dict(state["fingerprint"])
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ConfigError(f"{path} is no checkpoint ({error}).", hint="Delete it to train anew.") from error
        mine = self._written_for
        if different := [f"{name} ({written.get(name)}, now {mine[name]})" for name in mine if written.get(name) != mine[name]]:
            raise ConfigError(
                f"{path} was written with another {', '.join(different)}.",
                hint="Use the same options and data to go on, or another --output to start anew.",
            )
        self.num_updates_done = state["num_updates_done"]
        self.heads.load_state_dict(state["heads"])
        self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if self.base is not None:
            self.base.load_state_dict(state["base"])

    @torch.no_grad()
    def validate(self, rows: Sequence[Row], num_candidates: int = 10) -> list[tuple[float, float]]:
        """(top-1, top-C) accuracy of each head of `trained` on other rows; tokens outside the draft vocabulary count as missed."""
        num_heads = self.plan.shape.num_heads
        hits_K2 = torch.zeros(num_heads, 2)
        counts_K = torch.zeros(num_heads)
        for text in self._read(rows, [row.targets(num_heads) for row in rows]):
            for at_N in self._parts(text.target_TK):
                for head, x_NE in enumerate(self._unroll(self.trained, text, at_N)):
                    is_target_N = text.target_TK[at_N, head] != NO_TARGET
                    logits_NV = self._logits(self.trained, text, head, at_N[is_target_N], x_NE[is_target_N])
                    best_NC = logits_NV.topk(num_candidates, dim=-1).indices
                    hit_NC = best_NC == self._draft_targets(text.target_TK[at_N, head][is_target_N])[:, None]
                    hits_K2[head] += torch.stack((hit_NC[:, 0].sum(), hit_NC.sum())).cpu()
                    counts_K[head] += len(best_NC)
        shares_K2 = hits_K2 / counts_K.clamp(min=1)[:, None]
        return [(top1, top10) for top1, top10 in shares_K2.tolist()]

    @torch.no_grad()
    def compare_base(self, rows: Sequence[Row]) -> float:
        """How often the base model, trained or not, says the same next token as it did before training; 0 to 1."""
        num_same = num_positions = 0
        for text in self._read(rows, [row.targets(1) for row in rows]):
            at_N = torch.nonzero(text.target_TK[:, 0] != NO_TARGET).flatten() + 1
            num_positions += len(at_N)
            for part_N in torch.split(at_N, max(_MAX_LOGITS // self._loaded.vocab_size, 1)):
                now_N, before_N = (
                    self._loaded.project(states_TE[part_N]).argmax(dim=-1) for states_TE in (text.hidden_TE, text.original_TE)
                )
                num_same += int((now_N == before_N).sum())
        return num_same / max(num_positions, 1)

    @property
    def _updates_per_epoch(self) -> int:
        return math.ceil(len(self._rows) / self.plan.rows_per_update)

    def _num_rows_done(self) -> int:
        epochs, updates = divmod(self.num_updates_done, self._updates_per_epoch)
        return epochs * len(self._rows) + updates * self.plan.rows_per_update

    def _moving_average(self, average: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        decay = min(self.plan.ema_decay, (1 + int(num_averaged)) / (10 + int(num_averaged)))
        return torch.lerp(average, current, 1.0 - decay)

    def _rows_of(self, update: int) -> list[Row]:
        """The rows of an update: every epoch takes them all, in an order of its own that the seed decides."""
        epoch, number = divmod(update, self._updates_per_epoch)
        generator = torch.Generator().manual_seed(self.plan.seed + epoch)
        order = torch.randperm(len(self._rows), generator=generator).tolist()
        first = number * self.plan.rows_per_update
        return [self._rows[index] for index in order[first : first + self.plan.rows_per_update]]

    def _learn(self, rows: Sequence[Row]) -> float:
        """Add the gradients of an update, in which every position counts the same, whichever row it is in. Returns its loss."""
        targets = [row.targets(self.plan.shape.num_heads) for row in rows]
        num_positions_K = (torch.stack(targets) != NO_TARGET).sum(dim=(0, 1)).tolist()
        losses: list[Tensor] = []
        for text in self._read(rows, targets):
            losses += [self._learn_part(text, at_N, num_positions_K) for at_N in self._parts(text.target_TK)]
            if self._is_joint:
                losses += self._learn_base(text, num_positions_K[0])
        # read once an update, as reading waits for the device
        return float(torch.stack(losses).sum()) if losses else 0.0

    def _learn_part(self, text: _Text, at_N: Tensor, num_positions_K: Sequence[int]) -> Tensor:
        """The share of some of a text's positions. num_positions_K: of the whole update. The logits of one head at a time are in
        memory: its gradient is carried up to the blocks, and through all heads' blocks at the end."""
        outputs = self._unroll(self.heads, text, at_N)
        total = text.hidden_TE.new_zeros((), dtype=torch.float32)
        gradients = []
        for head, x_NE in enumerate(outputs):
            x_NE = x_NE.detach().requires_grad_()
            is_target_N = text.target_TK[at_N, head] != NO_TARGET
            if (num_targets := int(is_target_N.sum())) > 0:
                loss = self._head_loss(text, head, at_N[is_target_N], x_NE[is_target_N])
                weight = self.plan.loss.decay**head * num_targets / num_positions_K[head]
                loss = loss * (weight if self.plan.joint is None or not self._is_joint else weight * self.plan.joint.heads_weight)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            gradients.append(torch.zeros_like(x_NE) if x_NE.grad is None else x_NE.grad)
        torch.autograd.backward(outputs, gradients)
        return total

    def _head_loss(self, text: _Text, head: int, at_N: Tensor, x_NE: Tensor) -> Tensor:
        """x_NE: what the head hands to the output layer at the positions at_N, which all have a target."""
        teacher_NV = None
        if self.plan.loss.needs_teacher:
            with torch.no_grad():
                # the base model says at t + 1 + k what the head guesses from t
                teacher_NV = self._projection(text.original_TE[at_N + 1 + head])
        logits_NV = self._logits(self.heads, text, head, at_N, x_NE)
        return head_loss(logits_NV, self._draft_targets(text.target_TK[at_N, head]), teacher_NV, self.plan.loss)

    def _learn_base(self, text: _Text, num_positions: int) -> list[Tensor]:
        """The base model's own losses in the joint stage, of the tokens that the first head guesses too, and their gradients on its
        hidden states."""
        losses: list[Tensor] = []
        at_N = torch.nonzero(text.target_TK[:, 0] != NO_TARGET).flatten()
        if not len(at_N):
            return losses
        for part_N in torch.split(at_N, max(_MAX_LOGITS // self._loaded.vocab_size, 1)):
            with torch.no_grad():
                original_NV = self._loaded.project(text.original_TE[part_N + 1])
            logits_NV = self._loaded.project(text.hidden_TE[part_N + 1])
            target_N = text.target_TK[part_N, 0].to(logits_NV.device)
            loss = head_loss(logits_NV, target_N, original_NV, self.plan.loss) * (len(part_N) / num_positions)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return losses

    @property
    def _is_joint(self) -> bool:
        return self.base is not None and self.num_updates_done >= self.num_updates_alone

    def _read(self, rows: Sequence[Row], targets: Sequence[Tensor]) -> Iterator[_Text]:
        """Run the base model over the rows, several at once. In the joint stage, the gradient that has come together on a text's
        hidden states when the next one is asked for goes on through the model."""
        device, is_learning = self._loaded.device, self._is_joint and torch.is_grad_enabled()
        at_once = max((_MAX_JOINT_TOKENS if is_learning else _MAX_READ_TOKENS) // len(rows[0].token_ids_T), 1)
        for first in range(0, len(rows), at_once):
            group = slice(first, first + at_once)
            token_ids_BT = torch.stack([row.token_ids_T for row in rows[group]])
            inputs = (token_ids_BT.to(device), torch.stack([row.position_ids_T for row in rows[group]]).to(device))
            if self.base is None:
                original_BTE = hidden_BTE = read_frozen(self._loaded, *inputs)
            else:
                original_BTE, hidden_BTE = self.base.read(*inputs, has_started=self._is_joint)
            read_TE = hidden_BTE.detach().flatten(0, 1).requires_grad_(is_learning)
            target_TK = torch.cat(list(targets[group]))
            yield _Text(token_ids_BT.flatten(), read_TE, original_BTE.flatten(0, 1), target_TK)
            if is_learning and read_TE.grad is not None:
                torch.autograd.backward(hidden_BTE, read_TE.grad.view_as(hidden_BTE))

    def _new_heads(self, token_map_V: Tensor | None) -> SequentialHeads:
        """Float32, and the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan.seed)
            heads = SequentialHeads(
                self.plan.shape,
                hidden_size=self._loaded.hidden_size,
                vocab_size=self._projection.num_tokens,
                base_vocab_size=self._loaded.vocab_size,
            )
        heads.to(self._loaded.device)
        heads.set_vocabulary(None if token_map_V is None else token_map_V.to(self._loaded.device), self._loaded.vocab_size)
        # of logits that are scaled, the scale is part of a layer of the heads' own
        heads.reset(self._projection.linear.weight * self._projection.multiplier)
        return heads

    def _unroll(self, heads: SequentialHeads, text: _Text, at_N: Tensor) -> list[Tensor]:
        """What each head hands to the output layer at these positions, [N, E]."""
        before_NK = torch.stack([text.token_before(head, at_N) for head in range(heads.num_heads)], dim=1)
        with self._mixed_precision():
            return list(heads.unroll(text.hidden_TE[at_N], before_NK.to(self._loaded.device), self._embed))

    def _logits(self, heads: SequentialHeads, text: _Text, head: int, at_N: Tensor, x_NE: Tensor) -> Tensor:
        """Draft logits, float32 [N, V], at positions that have a target."""

        def project(x_NE: Tensor) -> Tensor:
            logits_NV: Tensor = self._projection(x_NE.to(self._loaded.dtype))
            return logits_NV

        with self._mixed_precision():
            return heads.logits(head, x_NE, text.token_before(head, at_N).to(x_NE.device), project)

    def _mixed_precision(self) -> torch.autocast:
        """The base model's dtype is used for the heads' products, their weights are float32."""
        dtype = self._loaded.dtype
        return torch.autocast(self._loaded.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def _parts(self, target_TK: Tensor) -> Iterator[Tensor]:
        """Positions from which some head has a target, int64, so many at a time as memory is planned for."""
        positions = torch.nonzero((target_TK != NO_TARGET).any(dim=1)).flatten()
        if len(positions):
            yield from torch.split(positions, max(_MAX_LOGITS // self._projection.num_tokens, 1))

    def _draft_targets(self, target_N: Tensor) -> Tensor:
        return self._draft_ids[target_N].to(self._loaded.device)

    def _learning_rate_factor(self, update: int) -> float:
        return _warm_cosine(update, self.num_updates, self.plan.warmup_share)

    def _base_learning_rate_factor(self, update: int) -> float:
        first = self.num_updates_alone
        return 0.0 if update < first else _warm_cosine(update - first, self.num_updates - first, self.plan.warmup_share)

    def _fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree on."""
        data = weights = 0
        for row in self._rows:
            data = zlib.crc32(row.learned_T.numpy().tobytes(), zlib.crc32(row.token_ids_T.numpy().tobytes(), data))
        for parameter in self._loaded.model.parameters():
            sample = parameter.detach().flatten()[:_SAMPLED_WEIGHTS].float().cpu()
            weights = zlib.crc32(sample.numpy().tobytes(), weights)
        plan = asdict(self.plan)
        return {
            **plan.pop("loss"),
            **plan.pop("shape"),
            "joint": str(plan.pop("joint")),
            **plan,
            "model": f"{self._loaded.name}, {self._loaded.dtype}, CRC-32 {weights:08x}",
            "data": f"{len(self._rows)} rows, CRC-32 {data:08x}",
            "draft vocabulary": f"{int((self._draft_ids != NO_TARGET).sum())} tokens",
        }


def _warm_cosine(update: int, num_updates: int, warmup_share: float) -> float:
    num_warmup = int(warmup_share * num_updates)
    if update < num_warmup:
        return (update + 1) / num_warmup
    return 0.5 * (1.0 + math.cos(math.pi * (update - num_warmup) / max(num_updates - num_warmup, 1)))
