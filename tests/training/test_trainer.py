"""Training on a tiny model: heads learn, the base model does not change, and a stopped run goes on bit for bit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from medusa_core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from medusa_core.engine.build import build_engine
from medusa_core.errors import ConfigError
from medusa_core.model.checkpoint import load_heads
from medusa_core.model.heads import MedusaHeads
from medusa_core.model.loader import load_model
from medusa_core.params import SamplingParams
from medusa_core.training.answers import answer_prompts
from medusa_core.training.export import export_heads
from medusa_core.training.losses import LossWeights, head_loss
from medusa_core.training.measure import observed_ranks
from medusa_core.training.packing import pack_samples
from medusa_core.training.plan import TrainingPlan
from medusa_core.training.samples import Sample, answer_sample
from medusa_core.training.trainer import Trainer
from medusa_core.training.tuned_base import JointPlan
from medusa_core.training.vocabulary import choose_draft_vocabulary
from tests.engine.tiny_model import HIDDEN_SIZE, VOCAB_SIZE, save_tiny_model
from tests.training.shapes import SHAPES

PLAN = TrainingPlan(shape=SHAPES["medusa"], epochs=3, rows_per_update=2, learning_rate=0.02, ema_decay=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("trainer") / "tiny")


@pytest.fixture
def loaded(folder):
    return load_model(ModelConfig(model=str(folder), dtype="float32", device="cpu"), progress=False)


@pytest.fixture(scope="module")
def answers(folder):
    model = ModelConfig(model=str(folder), heads="none", dtype="float32", device="cpu")
    core = build_engine(
        EngineConfig(model=model, cache=CacheConfig(num_blocks=200), scheduler=SchedulerConfig(max_num_seqs=8)), progress=False
    )
    prompts = [("any", [1, 10 + n, 40 + n % 5]) for n in range(24)]
    return answer_prompts(core, prompts, SamplingParams(temperature=0.0, max_tokens=40), progress=False)


@pytest.fixture(scope="module")
def rows(answers):
    return pack_samples([answer_sample(answer) for answer in answers], 64)[0]


def finished(loaded, rows, plan=PLAN, token_map=None):
    trainer = Trainer(loaded, rows, plan, token_map)
    steps = list(trainer.run())
    assert [step.update for step in steps] == list(range(1, trainer.num_updates + 1))
    return trainer, steps


@pytest.mark.parametrize(
    "loss",
    [
        LossWeights(cross_entropy=1.0, distillation=0.0),
        LossWeights(cross_entropy=0.0, distillation=1.0),
        LossWeights(cross_entropy=0.3, distillation=0.3, total_variation=0.4),
    ],
    ids=["text", "distilled", "mixed"],
)
def test_every_loss_teaches(loaded, rows, loss):
    _learns(loaded, rows, dataclasses.replace(PLAN, epochs=30, loss=loss))


@pytest.mark.parametrize("shape", SHAPES)
def test_heads_of_every_shape_learn_and_the_base_model_stays_as_it_is(loaded, rows, shape):
    rate = 0.02 if SHAPES[shape].output == "shared" and not SHAPES[shape].is_gated else 0.005
    _learns(loaded, rows, dataclasses.replace(PLAN, epochs=30, shape=SHAPES[shape], learning_rate=rate))


def _learns(loaded, rows, plan):
    # surer of what it says, greedily the same: the model's distribution then points to the text's tokens
    loaded.project.linear.weight.mul_(5.0)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    untrained = Trainer(loaded, rows, plan, None).validate(rows)
    trainer, steps = finished(loaded, rows, plan)
    assert steps[-1].loss < 0.9 * steps[0].loss
    for (_, top10), (_, untrained_top10) in zip(trainer.validate(rows), untrained, strict=True):
        assert top10 > 1.2 * untrained_top10
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("shape", ["medusa", "sequential, all at once"])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_run_goes_on_bit_for_bit(loaded, rows, tmp_path, stop, shape):
    plan = dataclasses.replace(PLAN, shape=SHAPES[shape])
    whole, steps = finished(loaded, rows, plan)
    assert stop < len(steps)
    first = Trainer(loaded, rows, plan, None)
    updates = iter(range(stop, -1, -1))
    head = list(first.run(lambda: next(updates) == 0))
    first.save(tmp_path / "checkpoint.pt")
    second = Trainer(loaded, rows, plan, None)
    second.load(tmp_path / "checkpoint.pt")
    tail = list(second.run())
    assert [step.loss for step in (*head, *tail)] == [step.loss for step in steps]
    for name in ("heads", "trained"):
        expected = getattr(whole, name).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in getattr(second, name).state_dict().items())


def test_a_checkpoint_of_another_run_is_refused(loaded, rows, tmp_path):
    path = tmp_path / "checkpoint.pt"
    Trainer(loaded, rows, PLAN, None).save(path)
    with pytest.raises(ConfigError, match=r"another seed \(0, now 1\).*--output"):
        Trainer(loaded, rows, dataclasses.replace(PLAN, seed=1), None).load(path)
    with pytest.raises(ConfigError, match="another data"):
        Trainer(loaded, rows[:-1], PLAN, None).load(path)
    loaded.model.model.norm.weight.mul_(2.0)
    with pytest.raises(ConfigError, match="another model"):
        Trainer(loaded, rows, PLAN, None).load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"is no checkpoint.*Delete it"):
        Trainer(loaded, rows, PLAN, None).load(path)


def test_what_is_exported_is_the_average_of_the_updates(loaded, rows):
    smooth, _ = finished(loaded, rows)
    last, _ = finished(loaded, rows, dataclasses.replace(PLAN, ema_decay=0.0))
    assert all(torch.equal(a, b) for a, b in zip(smooth.heads.parameters(), last.trained.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(smooth.trained.parameters(), last.trained.parameters(), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draft_vocab_size", [64, VOCAB_SIZE])
def test_exported_heads_guess_what_the_trained_ones_do(loaded, rows, tmp_path, draft_vocab_size, shape):
    token_map = choose_draft_vocabulary(rows, VOCAB_SIZE, draft_vocab_size)
    trainer, _ = finished(loaded, rows, dataclasses.replace(PLAN, shape=SHAPES[shape]), token_map=token_map)
    path = tmp_path / "medusa_lm_head.safetensors"
    export_heads(trainer.trained, path, token_map_V=token_map, dtype=torch.float32, metadata={"base_model": "tiny"})
    heads = load_heads(tmp_path, loaded)
    assert (heads.num_heads, heads.num_layers) == (2, SHAPES[shape].num_layers)
    assert isinstance(heads, MedusaHeads) == SHAPES[shape].is_published
    ids_T = rows[0].token_ids_T
    before_TK = torch.stack([ids_T.roll(-1), ids_T.roll(-2)], dim=1)
    embed = loaded.model.get_input_embeddings()
    projection = loaded.project if token_map is None else loaded.project.restricted_to(token_map)
    with torch.inference_mode():
        hidden = loaded.base_model(input_ids=ids_T[None], use_cache=False).last_hidden_state[0]
        drafted = heads.candidates_along(hidden, before_TK, 5, project=loaded.project, embed=embed)
        trained = trainer.trained.candidates_along(hidden, before_TK, 5, project=projection, embed=embed)
    assert torch.equal(drafted, trained)


def test_accuracy_on_rows_is_that_of_the_engines_heads_along_the_answers(loaded, rows, answers, tmp_path):
    trainer, _ = finished(loaded, rows)
    export_heads(trainer.trained, tmp_path / "medusa_lm_head.safetensors", token_map_V=None, dtype=torch.float32, metadata={})
    heads = load_heads(tmp_path, loaded, draft_vocab_size=None)
    ranks = [observed_ranks(heads, loaded, answer, 10) for answer in answers]
    for head, (top1, top10) in enumerate(trainer.validate(rows)):
        # where a head has a token to guess at all: the trainer asks head 2 for the first root's successor too, which is no draft
        exist = torch.cat([rank[: len(rank) - head, head] for rank in ranks])
        num_more = len(answers) * (1 + head) / (len(exist) + len(answers) * (1 + head))
        assert float((exist == 0).float().mean()) == pytest.approx(top1, abs=num_more)
        assert float((exist < 10).float().mean()) == pytest.approx(top10, abs=num_more)


def test_every_position_of_an_update_counts_the_same(loaded, answers):
    """However its documents are spread over rows, an update has the same gradients."""
    samples = [answer_sample(answer) for answer in answers]
    gradients = []
    for row_len in (50, 64, 300):
        rows = pack_samples(samples, row_len)[0]
        plan = dataclasses.replace(PLAN, rows_per_update=len(rows), epochs=1, learning_rate=1e-9)
        trainer = Trainer(loaded, rows, plan, None)
        assert trainer._learn(rows) > 0.0
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.heads.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-5)


JOINT = dataclasses.replace(PLAN, shape=SHAPES["sequential, shared"], epochs=1, learning_rate=0.005)


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_medusa_2_teaches_the_model_too_but_only_in_the_second_stage(loaded, rows, tmp_path, lora_rank):
    names_before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    plan = dataclasses.replace(JOINT, joint=JointPlan(epochs=3, lora_rank=lora_rank, learning_rate=0.01, heads_weight=1.0))
    trainer = Trainer(loaded, rows, plan, None)
    start = [parameter.clone() for parameter in trainer.base.parameters]
    for step in trainer.run():
        is_as_before = all(torch.equal(a, b) for a, b in zip(trainer.base.parameters, start, strict=True))
        assert is_as_before == (step.update <= trainer.num_updates_alone)
        assert (trainer.compare_base(rows) == 1.0) or not is_as_before
    assert trainer.compare_base(rows) < 1.0
    trainer.base.save(tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert names_before.keys() == saved.keys()
    changed = {name for name, tensor in names_before.items() if not torch.equal(tensor, saved[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert not any("embed_tokens" in name or "lm_head" in name for name in changed)


def test_adapters_leave_the_weights_below_them_as_they_are(loaded, rows):
    before = [parameter.clone() for parameter in loaded.model.parameters()]
    trainer = Trainer(loaded, rows, dataclasses.replace(JOINT, joint=JointPlan(epochs=1, lora_rank=4)), None)
    list(trainer.run())
    trained = {id(parameter) for parameter in trainer.base.parameters}
    after = [parameter for parameter in loaded.model.parameters() if id(parameter) not in trained]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_the_model_of_medusa_2_learns_what_the_text_says(loaded, rows):
    """With the text as its teacher, its own loss falls."""
    text_only = LossWeights(cross_entropy=1.0, distillation=0.0)
    joint = JointPlan(epochs=12, lora_rank=8, learning_rate=0.01, heads_weight=0.1)
    trainer = Trainer(loaded, rows, dataclasses.replace(JOINT, loss=text_only, joint=joint), None)

    def own_loss():
        total = 0.0
        for text in trainer._read(rows, [row.targets(1) for row in rows]):
            at = torch.nonzero(text.target_TK[:, 0] != -100).flatten()
            logits = loaded.project(text.hidden_TE[at + 1]).detach()
            total += float(torch.nn.functional.cross_entropy(logits, text.target_TK[at, 0], reduction="sum"))
        return total

    before = own_loss()
    list(trainer.run())
    assert own_loss() < 0.8 * before


@pytest.mark.parametrize("lora_rank", [4, 0])
@pytest.mark.parametrize("is_in_second_stage", [False, True])
def test_a_stopped_joint_run_goes_on_bit_for_bit(folder, rows, tmp_path, is_in_second_stage, lora_rank):
    plan = dataclasses.replace(JOINT, joint=JointPlan(epochs=1, lora_rank=lora_rank, learning_rate=0.01))

    def fresh():
        loaded = load_model(ModelConfig(model=str(folder), dtype="float32", device="cpu"), progress=False)
        return Trainer(loaded, rows, plan, None)

    whole, first, second = fresh(), fresh(), fresh()
    losses = [step.loss for step in whole.run()]
    stop = first.num_updates_alone + 2 if is_in_second_stage else 1
    assert stop < first.num_updates
    updates = iter(range(stop, -1, -1))
    head = [step.loss for step in first.run(lambda: next(updates) == 0)]
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    assert head + [step.loss for step in second.run()] == losses
    assert all(torch.equal(a, b) for a, b in zip(second.base.parameters, whole.base.parameters, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_new_heads_guess_what_the_model_says_next(loaded, rows, shape):
    heads = Trainer(loaded, rows, dataclasses.replace(PLAN, shape=SHAPES[shape]), None).heads
    hidden, before = torch.randn(5, HIDDEN_SIZE), torch.arange(10).view(5, 2)
    for head, x in enumerate(heads.unroll(hidden, before, loaded.model.get_input_embeddings())):
        assert torch.equal(x, hidden)
        torch.testing.assert_close(heads.logits(head, x, before[:, head], loaded.project), loaded.project(hidden))


def test_the_terms_of_the_loss():
    logits, teacher = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]]), torch.tensor([[1.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
    target = torch.tensor([1, -100])
    q, p = torch.softmax(logits, -1), torch.softmax(teacher, -1)
    expected = {
        "cross_entropy": -math.log(q[0, 1]) / 2,
        "distillation": -float((p * q.log()).sum()) / 2,
        # of the sum of what both agree on, the rest is rejected
        "total_variation": 1.0 - float(torch.minimum(p, q).sum()) / 2,
    }
    none = dict.fromkeys(expected, 0.0)
    for name, value in expected.items():
        assert float(head_loss(logits, target, teacher, LossWeights(**{**none, name: 1.0}))) == pytest.approx(value, rel=1e-5)
    both = LossWeights(cross_entropy=0.5, distillation=2.0, total_variation=0.0)
    total = 0.5 * expected["cross_entropy"] + 2.0 * expected["distillation"]
    assert float(head_loss(logits, target, teacher, both)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LossWeights(cross_entropy=0.0, distillation=0.0),
        lambda: LossWeights(cross_entropy=-1.0),
        lambda: LossWeights(decay=0.0),
        lambda: TrainingPlan(epochs=0),
        lambda: TrainingPlan(learning_rate=0.0),
        lambda: TrainingPlan(ema_decay=1.0),
    ],
)
def test_plans_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()


def test_no_data_is_refused(loaded):
    with pytest.raises(ConfigError, match="nothing to learn from"):
        Trainer(loaded, [], PLAN, None)
    short = pack_samples([Sample(token_ids=[n, 5], learned=[True, True]) for n in range(20)], 16)[0]
    with pytest.raises(ConfigError, match="all texts are too short"):
        Trainer(loaded, short, PLAN, None)


def test_a_loss_that_is_no_number_ends_the_run(loaded, rows):
    trainer = Trainer(loaded, rows, PLAN, None)
    with torch.no_grad():
        trainer.heads.blocks[1][0].linear.weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match=r"The loss of update 1 is nan.*Lower --learning-rate"):
        list(trainer.run())


def test_the_average_of_a_short_run_is_not_that_of_its_beginning(loaded, rows):
    """However slow the average is meant to be: after a few updates it is near the last of them."""
    trainer, _ = finished(loaded, rows, dataclasses.replace(PLAN, ema_decay=0.999))
    start = Trainer(loaded, rows, PLAN, None).heads

    def distance(a, b):
        return sum(float((x - y).detach().norm()) for x, y in zip(a.parameters(), b.parameters(), strict=True))

    assert distance(trainer.trained, trainer.heads) < 0.5 * distance(start, trainer.heads)


def test_progress_counts_the_tokens_of_smaller_last_updates(loaded, rows):
    plan = dataclasses.replace(PLAN, rows_per_update=len(rows) - 1, epochs=2)
    _, steps = finished(loaded, rows, plan)
    counted = [step.num_tokens // 64 for step in steps]
    assert counted == [len(rows) - 1, len(rows), 2 * len(rows) - 1, 2 * len(rows)]
