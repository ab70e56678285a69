"""Fused layers give what the originals give, and nothing is swapped that does something else."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from medusa_core.attention.segments import AttentionParams
from medusa_core.kernels.support import KernelError
from medusa_core.model import fusion
from medusa_core.model.attention_hook import forward_hidden, install_attention
from medusa_core.model.fused_layer import Float32Linear, FusedDecoderLayer, FusedRMSNorm, TabledRotary
from medusa_core.model.fusion import fuse_model, fuse_projection
from medusa_core.model.heads import MedusaHeads
from medusa_core.model.projection import Projection
from tests import options
from tests.equivalence.models import ARCHITECTURES, tiny_model

FUSED = {"llama", "qwen2", "qwen3", "mistral"}
DTYPES = [torch.float32, torch.float16] + ([] if options.device == "cpu" else [torch.bfloat16])
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
MAX_MODEL_LEN = 64


class DenseContext:
    """Causal attention over the rows of one step, for original and fused layers alike."""

    def __init__(self, num_rows):
        self.slots_T = torch.arange(num_rows, 0, -1, device=options.device)
        self.caches = {}
        self.params = {}

    def layer(self, layer_idx):
        return self.caches[layer_idx]

    def attend(self, layer_idx, query_THD, key_TGD, value_TGD, params: AttentionParams):
        self.params[layer_idx] = params
        return fusion._attend_densely(query_THD, key_TGD, value_TGD, params)

    def attend_written(self, layer_idx, query_THD, params):
        key_slots, value_slots = self.caches[layer_idx]
        return self.attend(layer_idx, query_THD, key_slots[self.slots_T], value_slots[self.slots_T], params)


def fresh(architecture, dtype=torch.float32):
    """Two layers of it: the interpreter is slow."""
    model = copy.deepcopy(tiny_model(architecture).model).to(dtype)
    trunk = getattr(model, model.base_model_prefix)
    trunk.layers = trunk.layers[:2]
    model.config.num_hidden_layers = 2
    install_attention(model)
    return model


def run(model, num_rows):
    """Hidden states [T, E] and the context."""
    context = DenseContext(num_rows)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for idx in range(config.num_hidden_layers):
        shape = (num_rows + 1, config.num_key_value_heads, head_dim)
        context.caches[idx] = tuple(torch.zeros(shape, dtype=model.dtype, device=options.device) for _ in range(2))
    ids = torch.randint(90, (num_rows,), generator=torch.Generator().manual_seed(num_rows)).to(options.device)
    with torch.inference_mode():
        return forward_hidden(model, ids, torch.arange(num_rows, device=options.device), context), context


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.long] if dtype is torch.float16 and name != "qwen2" else [])
        for name in sorted(FUSED)
        for dtype in DTYPES
    ],
)
def test_a_fused_model_gives_the_hidden_states_of_the_original(architecture, dtype):
    model = fresh(architecture, dtype)
    expected = {num_rows: run(model, num_rows) for num_rows in (1, 20, 65)}
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    # the norms ahead of two products of each layer go into their weights
    num_norm_weights = 2 * 2 * model.config.hidden_size

    report = fuse_model(model, MAX_MODEL_LEN)

    assert str(report) == "2 of 2 layers, the final norm, rotary tables"
    assert all(isinstance(layer, FusedDecoderLayer) for layer in model.model.layers)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_weights - num_norm_weights
    for num_rows, (hidden, context) in expected.items():
        actual, fused_context = run(model, num_rows)
        error = (actual - hidden).float().norm() / hidden.float().norm()
        assert error <= TOLERANCES[dtype]
        assert fused_context.params == context.params


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - FUSED))
def test_layers_of_other_families_are_left_alone(architecture):
    model = fresh(architecture)
    trunk = getattr(model, model.base_model_prefix)
    layers = list(trunk.layers)
    report = fuse_model(model, MAX_MODEL_LEN)
    assert report.num_fused_layers == 0
    assert not report.has_fused_norm
    assert list(trunk.layers) == layers


def gemma():
    """Gemma's first generation has the names of Llama's layers, a norm that adds one to its weight, and another activation."""
    config = CONFIG_MAPPING["gemma"](
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to(options.device)


def test_the_activation_is_part_of_the_structure():
    assert fuse_model(gemma(), MAX_MODEL_LEN).num_fused_layers == 0


class HalvedMlp(nn.Module):
    """An MLP with all the parts of a gated SiLU MLP that does something else with them."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 0.5


def test_what_looks_alike_but_differs_fails_the_proof(caplog):
    model = fresh("llama")
    odd = model.model.layers[1]
    odd.mlp = HalvedMlp(odd.mlp)
    assert fusion.match_gated_layer(odd) is not None
    expected = run(model, 9)[0]

    report = fuse_model(model, MAX_MODEL_LEN)

    assert (report.num_fused_layers, report.num_layers) == (1, 2)
    assert model.model.layers[1] is odd
    assert "differs from its fused counterpart" in caplog.text
    assert torch.allclose(run(model, 9)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_forward_that_fails_is_left_alone(caplog):
    model = fresh("llama")
    odd = model.model.layers[0]
    odd.mlp.forward = lambda x, gate: x
    assert fuse_model(model, MAX_MODEL_LEN).num_fused_layers == 1
    assert model.model.layers[0] is odd
    assert "left as it is" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.self_attn, "extra", nn.Linear(2, 2)),
        lambda layer: setattr(layer, "third_norm", nn.Identity()),
        lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()),
        lambda layer: setattr(layer.mlp, "gate_proj", nn.Linear(48, 64)),
        lambda layer: setattr(layer.self_attn, "q_proj", nn.Linear(48, 40, bias=False)),
        lambda layer: setattr(layer.self_attn, "k_proj", nn.Linear(48, 24, bias=True)),
        lambda layer: setattr(layer.self_attn, "layer_idx", None),
        lambda layer: setattr(layer, "input_layernorm", nn.LayerNorm(48)),
        lambda layer: layer.register_buffer("sinks", torch.zeros(4)),
    ],
)
def test_a_layer_with_other_parts_does_not_match(change):
    layer = fresh("llama").model.layers[0]
    assert fusion.match_gated_layer(layer) is not None
    change(layer)
    assert fusion.match_gated_layer(layer) is None


def test_rotary_tables_are_the_originals_bits():
    model = fresh("qwen2", torch.float16)
    rotary = model.model.rotary_emb
    fuse_model(model, MAX_MODEL_LEN)
    tables = model.model.rotary_emb
    assert isinstance(tables, TabledRotary)
    # the last tree of a request reaches beyond its longest sequence
    position_ids = torch.tensor([[0, 63, 5, 5, 64 + 63]], device=options.device)
    x = torch.zeros(1, 5, 48, dtype=torch.float16, device=options.device)
    assert all(map(torch.equal, tables(x, position_ids), rotary(x, position_ids)))


class LengthRotary(nn.Module):
    """A rotary module whose answer depends on the longest position of the call, as dynamic rope scaling does."""

    def forward(self, x, position_ids):
        angles = position_ids[..., None].float() / (1 + position_ids.max()) * torch.ones(12, device=x.device)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def test_a_rotary_module_that_looks_at_other_positions_stays():
    model = fresh("llama")
    model.model.rotary_emb = LengthRotary()
    report = fuse_model(model, MAX_MODEL_LEN)
    assert not report.has_tabled_rotary
    assert isinstance(model.model.rotary_emb, LengthRotary)


def test_a_fused_projection_keeps_float32_sums_and_its_weight():
    head = nn.Linear(48, 130, bias=False, dtype=torch.float16, device=options.device).requires_grad_(False)
    projection = Projection(head, multiplier=0.5)
    assert fuse_projection(projection)
    assert isinstance(projection.linear, Float32Linear)
    assert projection.linear.weight is head.weight
    hidden = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0)).to(options.device, torch.float16)
    expected = nn.functional.linear(hidden.float(), head.weight.float()) * 0.5
    with torch.inference_mode():
        torch.testing.assert_close(projection(hidden), expected, rtol=1e-5, atol=1e-5)
        some = torch.tensor([5, 3], device=options.device)
        restricted = projection.restricted_to(some)
        torch.testing.assert_close(restricted(hidden), expected[..., some], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("num_rows", [1, 20, 70])
def test_a_fused_projection_finds_the_best_token(num_rows):
    torch.manual_seed(0)
    projection = Projection(nn.Linear(64, 300, bias=False, device=options.device, dtype=torch.float16).requires_grad_(False))
    fuse_projection(projection)
    hidden = torch.randn(num_rows, 64).to(options.device, torch.float16)
    best = projection.best_token(hidden)
    assert torch.equal(best, projection(hidden).argmax(dim=-1))
    assert num_rows == 1 or len(best.unique()) > 5


@pytest.mark.parametrize("change", [{"multiplier": 0.5}, {"softcap": 30.0}])
def test_a_scale_or_a_soft_cap_has_no_short_way_to_the_best_token(change):
    linear = nn.Linear(64, 300, bias=False, device=options.device, dtype=torch.float16).requires_grad_(False)
    projection = Projection(linear, **change)
    assert fuse_projection(projection)
    assert projection.best_token is None


def test_a_short_way_to_the_best_token_that_is_wrong_is_not_taken(monkeypatch, caplog):
    monkeypatch.setattr(Float32Linear, "best", lambda self, hidden: hidden.new_zeros(len(hidden), dtype=torch.int64))
    projection = Projection(nn.Linear(64, 300, bias=False, device=options.device, dtype=torch.float16).requires_grad_(False))
    assert fuse_projection(projection)
    assert projection.best_token is None
    assert "not found inside the output product" in caplog.text


def test_a_float32_projection_stays():
    projection = Projection(nn.Linear(48, 130))
    assert not fuse_projection(projection)
    assert type(projection.linear) is nn.Linear


@pytest.mark.cuda
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 20, 70])
def test_heads_on_a_gpu_equal_the_plain_products(has_bias, num_rows):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 64, 64, generator=generator) / 8
    bias = torch.randn(2, 3, 64, generator=generator) if has_bias else None
    hidden = torch.randn(num_rows, 64, generator=generator)
    expected = MedusaHeads(weight, bias).transform(hidden)
    heads = MedusaHeads(weight.cuda().bfloat16(), None if bias is None else bias.cuda().bfloat16())
    actual = heads.transform(hidden.cuda().bfloat16()).cpu().float()
    assert (actual - expected).norm() / expected.norm() <= 2e-2


def test_the_final_norm_is_proved_too():
    model = fresh("llama")
    odd = model.model.norm
    odd.forward = lambda x: x * odd.weight
    assert not fuse_model(model, MAX_MODEL_LEN).has_fused_norm
    assert model.model.norm is odd
    model = fresh("llama")
    fuse_model(model, MAX_MODEL_LEN)
    assert isinstance(model.model.norm, FusedRMSNorm)


def test_a_layer_stays_where_the_device_has_no_room_for_its_kernels(monkeypatch):
    def fail(*_, **__):
        raise KernelError("out of resource: shared memory")

    monkeypatch.setattr(FusedDecoderLayer, "forward", fail)
    assert fuse_model(fresh("llama"), MAX_MODEL_LEN).num_fused_layers == 0
