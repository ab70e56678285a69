"""The draw without a sort against the sampler with one, over all mixes of parameters."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from medusa_core.kernels import noise
from medusa_core.kernels.sampling import draw_rows
from medusa_core.sampling.noise import gumbel, hash_bits
from medusa_core.sampling.sampler import SamplingRows, draw
from tests import options

# numpy under the interpreter warns of what the kernels do on purpose: log(0), and -inf - -inf in a value that is not used
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

INF = float("inf")
GOLDEN = [2133699716, 3733818237, 4075731012, 608131580]
# small parts, so that short rows have many
PART_LEN = 256


@triton.jit
def _noise_kernel(key_ptr, index_ptr, bits_ptr, gumbel_ptr, num_tokens, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    low, high = noise.hash_state(tl.load(key_ptr + row), tl.load(index_ptr + row))
    out = row * num_tokens + tokens
    tl.store(bits_ptr + out, noise.hash_bits(low, high, tokens).to(tl.int32, bitcast=True), mask=tokens < num_tokens)
    tl.store(gumbel_ptr + out, noise.gumbel(low, high, tokens), mask=tokens < num_tokens)


def kernel_noise(key_R: torch.Tensor, index_R: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    bits_RV = torch.empty(key_R.shape[0], num_tokens, dtype=torch.int32, device=options.device)
    gumbel_RV = torch.empty(bits_RV.shape, device=options.device)
    grid = (key_R.shape[0], triton.cdiv(num_tokens, 4096))
    _noise_kernel[grid](key_R.to(options.device), index_R.to(options.device), bits_RV, gumbel_RV, num_tokens, 4096)
    return bits_RV.cpu(), gumbel_RV.cpu()


def test_noise_is_that_of_torch():
    """The same bits for every key; Gumbel noise within 1e-6, over 0.6 million values that reach both ends of the range."""
    keys = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63)])
    index = torch.tensor([0, 1, 7, 100_000, 2**40])
    tokens = torch.arange(120_000, dtype=torch.int32)
    bits, noise_RV = kernel_noise(keys, index, len(tokens))
    assert torch.equal(bits, hash_bits(keys, index, tokens))
    expected = gumbel(keys, index, tokens)
    assert expected.max() > 11
    assert expected.min() < -2.4
    assert ((noise_RV - expected).abs() <= 1e-6 * expected.abs().clamp(min=1.0)).all()


def test_golden_bits():
    bits, _ = kernel_noise(torch.tensor([0]), torch.tensor([0]), 4)
    assert [b & (2**32 - 1) for b in bits[0].tolist()] == GOLDEN


@triton.jit
def _gumbel_of_state_kernel(low_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    low = tl.load(low_ptr + offsets).to(tl.uint32, bitcast=True)
    # with the token as its own word and no second word, the bits are two rounds of the hash of 0 ^ low
    zero = tl.zeros([BLOCK], tl.int32)
    tl.store(out_ptr + offsets, noise.gumbel(low, zero.to(tl.uint32, bitcast=True), zero))


def unmix(bits: int) -> int:
    """The inverse of lowbias32."""

    def unshift(x: int, shift: int) -> int:
        y = x
        for _ in range(32 // shift):
            y = x ^ (y >> shift)
        return y

    x = unshift(bits, 16) * pow(0x846CA68B, -1, 2**32) % 2**32
    x = unshift(x, 15) * pow(0x7FEB352D, -1, 2**32) % 2**32
    return unshift(x, 16)


def test_noise_at_the_ends_of_its_range():
    """All bits 0, all bits 1 and their neighbours: finite, ordered, and equal to the definition in double precision."""
    wanted = [0, 1, 2, 255, 2**23, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2**9, 2**32 - 2, 2**32 - 1]
    words = [unmix(unmix(bits)) for bits in wanted]
    low = torch.tensor([w - 2**32 if w >= 2**31 else w for w in words] + [0] * 4, dtype=torch.int32, device=options.device)
    out = torch.empty(16, device=options.device)
    _gumbel_of_state_kernel[(1,)](low, out, 16)
    signed = torch.tensor([b - 2**32 if b >= 2**31 else b for b in wanted], dtype=torch.int32)
    uniform = signed.float() * 2.0**-32 + (signed < 0).float() + 2.0**-33
    uniform = uniform.clamp(2.0**-33, 1 - 2.0**-24).double()
    expected = -(-(-uniform).log1p()).log()
    found = out[: len(wanted)].cpu()
    assert found.isfinite().all()
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)


def parameters(num_lanes: int, seed: int, num_columns: int) -> dict[str, torch.Tensor]:
    """Lanes that together hold every mix of filters, in random order."""
    generator = torch.Generator().manual_seed(seed)
    mixes = list(
        itertools.product(
            [0.0, 0.3, 0.7, 1.0, 2.5],
            [0, 1, 3, 20, 300, num_columns + 5],
            [1.0, 0.95, 0.6, 0.1, 0.0],
            [0.0, 0.02, 0.5, 1.0],
            [0, 4],
        )
    )
    order = torch.randperm(len(mixes), generator=generator).tolist()
    rows = [mixes[order[i % len(mixes)]] for i in range(num_lanes)]
    temperature, top_k, top_p, min_p, min_tokens = zip(*rows, strict=True)
    stop_ids = torch.randint(-1, num_columns, (num_lanes, 5), generator=generator)
    stop_ids[::3, 2:] = -1
    keys = torch.randint(-(2**62), 2**62, (num_lanes,), generator=generator)
    tensors = {
        "temperature_P": torch.tensor(temperature),
        "top_k_P": torch.tensor(top_k),
        "top_p_P": torch.tensor(top_p),
        "min_p_P": torch.tensor(min_p),
        "min_tokens_P": torch.tensor(min_tokens),
        "stop_ids_PW": stop_ids,
        "key_P": keys,
    }
    return {name: tensor.to(options.device) for name, tensor in tensors.items()}


def reference(logits_RV: torch.Tensor, lane_R: torch.Tensor, index_R: torch.Tensor, lanes: dict) -> torch.Tensor:
    """`sampler.draw` with every filter on."""
    rows = {name[:-1].replace("_P", "_R"): value[lane_R] for name, value in ((f"{k}_", v) for k, v in lanes.items())}
    return draw(
        logits_RV,
        SamplingRows(
            epsilon_R=torch.zeros_like(rows["temperature_R"]),
            delta_R=torch.zeros_like(rows["temperature_R"]),
            **{("stop_ids_RW" if name.startswith("stop_ids") else name): value for name, value in rows.items()},
            is_all_greedy=False,
            has_top_k=True,
            has_top_p=True,
            has_min_p=True,
            has_min_tokens=True,
        ),
        index_R,
    )


def lanes_and_indices(num_rows: int, num_lanes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lane = torch.randint(0, num_lanes, (num_rows,), generator=generator)
    return lane.to(options.device), torch.randint(0, 8, (num_rows,), generator=generator).to(options.device)


def random_logits(num_rows: int, num_columns: int, seed: int) -> torch.Tensor:
    """From nearly flat rows to rows of one likely token; every other group of rows is rounded, hence full of ties."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 1.0, 3.0, 8.0])[torch.arange(num_rows) % 4].unsqueeze(1)
    logits = torch.randn(num_rows, num_columns, generator=generator) * spread
    is_rounded = (torch.arange(num_rows) // 4 % 2 == 1).unsqueeze(1)
    return torch.where(is_rounded, logits.round(decimals=1), logits).to(options.device)


@pytest.mark.parametrize(
    ("num_columns", "num_rows", "seed"),
    [pytest.param(1200, 150, 1, marks=pytest.mark.long), pytest.param(600, 250, 2, marks=pytest.mark.long), (60, 200, 3)],
)
def test_draws_are_those_of_the_sampler(num_columns, num_rows, seed):
    """600 draws, each with a mix of its own."""
    lanes = parameters(num_rows, seed, num_columns)
    logits = random_logits(num_rows, num_columns, seed)
    lane = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).to(options.device)
    _, index = lanes_and_indices(num_rows, num_rows, seed)
    drawn = draw_rows(logits, lane_R=lane, index_R=index, **lanes, part_len=PART_LEN)
    assert drawn.tolist() == reference(logits, lane, index, lanes).tolist()


def one_lane(**values) -> dict[str, torch.Tensor]:
    defaults = {"temperature_P": 1.0, "top_k_P": 0, "top_p_P": 1.0, "min_p_P": 0.0, "min_tokens_P": 0, "key_P": 0}
    lanes = {name: torch.tensor([value], device=options.device) for name, value in (defaults | values).items()}
    return {"stop_ids_PW": torch.full((1, 1), -1, device=options.device), **lanes}


def draw_many(logits_V: torch.Tensor, num_draws: int, **values) -> list[int]:
    """Draws of one row at indices 0, 1, 2, ..."""
    return draw_rows(
        logits_V.to(options.device).expand(num_draws, -1),
        lane_R=torch.zeros(num_draws, dtype=torch.int64, device=options.device),
        index_R=torch.arange(num_draws, device=options.device),
        **one_lane(**values),
        part_len=PART_LEN,
    ).tolist()


@pytest.mark.parametrize("top_p", [1.0, 0.999])
def test_ties_at_the_edge_of_top_k_are_all_kept(top_p):
    """Of 700 tokens, two are likelier than 40 equal ones, which are in all parts; top-k = 3 keeps all 42."""
    logits = torch.full((700,), -2.0)
    places = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    logits[places[:2]] = 3.1
    logits[places[2:42]] = 3.0
    drawn = set(draw_many(logits, 40, top_k_P=3, top_p_P=top_p))
    assert drawn <= set(places[:42].tolist())
    assert {token // PART_LEN for token in drawn - set(places[:2].tolist())} == {0, 1, 2}


@pytest.mark.parametrize("top_k", [1, 2, 256, 257])
def test_top_p_of_the_top_k_set_for_small_and_large_k(top_k):
    """top-p needs the exact mass of the top-k set, whose edge is found one way up to 256 and another way beyond."""
    logits = (-1e-3 * torch.arange(400.0))[torch.randperm(400, generator=torch.Generator().manual_seed(top_k))]
    drawn = draw_many(logits, 10, top_k_P=top_k, top_p_P=0.5)
    ranks = [round(-float(logits[token]) * 1e3) for token in drawn]
    weights = torch.softmax(-1e-3 * torch.arange(float(top_k)), 0)
    num_kept = int((weights.cumsum(0) < 0.5).sum()) + 1
    assert num_kept * 0.7 < max(ranks) + 1 <= num_kept
    lanes = one_lane(top_k_P=top_k, top_p_P=0.5)
    lane = torch.zeros(10, dtype=torch.int64, device=options.device)
    index = torch.arange(10, device=options.device)
    assert drawn == reference(logits.to(options.device).repeat(10, 1), lane, index, lanes).tolist()


def test_a_draw_depends_on_neither_its_batch_nor_its_place():
    lanes = parameters(60, 5, 900)
    lane, index = lanes_and_indices(40, 60, 5)
    logits = random_logits(40, 900, 5)
    together = draw_rows(logits, lane_R=lane, index_R=index, **lanes, part_len=PART_LEN)
    for row in range(0, 40, 3):
        one = slice(row, row + 1)
        alone = draw_rows(logits[one], lane_R=lane[one], index_R=index[one], **lanes, part_len=PART_LEN)
        assert alone.tolist() == together[one].tolist()


def test_stop_ids_are_banned_until_min_tokens():
    logits = torch.tensor([[0.0, 5.0, 4.0, 3.0]], device=options.device).repeat(6, 1)
    lanes = one_lane(min_tokens_P=2) | {"stop_ids_PW": torch.tensor([[1, 2, -1], [2, 1, -1]], device=options.device)}
    for name in lanes.keys() - {"stop_ids_PW"}:
        lanes[name] = lanes[name].repeat(2)
    # a greedy lane, and one whose top-k leaves nothing to chance
    lanes["temperature_P"] = torch.tensor([0.0, 0.8], device=options.device)
    lanes["top_k_P"] = torch.tensor([0, 1], device=options.device)
    index = torch.tensor([0, 1, 2, 0, 1, 2], device=options.device)
    lane = torch.tensor([0, 0, 0, 1, 1, 1], device=options.device)
    assert draw_rows(logits, lane_R=lane, index_R=index, **lanes).tolist() == [3, 3, 1, 3, 3, 1]
    assert logits[0, 1] == 5.0, "the caller's logits are not modified"


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.tensor([1.0, 40.0, 39.0, -2.0])
    assert draw_many(logits, 3, temperature_P=temperature, top_p_P=0.9, top_k_P=3, min_p_P=0.1) == [1, 1, 1]


def test_greedy_rows_take_the_first_of_equals():
    logits = torch.zeros(1000)
    logits[[300, 301, 900]] = 2.0
    assert draw_many(logits, 2, temperature_P=0.0) == [300, 300]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("filters", [{}, {"top_k_P": 5}, {"top_p_P": 0.5}, {"top_k_P": 300, "top_p_P": 0.9}, {"min_p_P": 0.2}])
def test_rows_with_nan_or_infinities_give_ids(temperature, filters):
    rows = torch.randn(5, 600, generator=torch.Generator().manual_seed(0))
    rows[0] = -INF
    rows[1] = torch.nan
    rows[2, :599] = -INF
    rows[3, 100] = INF
    rows[4, 1:] = torch.nan
    drawn = [draw_many(row, 1, temperature_P=temperature, **filters)[0] for row in rows]
    assert all(0 <= token < 600 for token in drawn)
    assert drawn[2:] == [599, 100, 0]


def test_rows_of_a_wider_tensor():
    wide = random_logits(20, 500, 7)
    wide[:, 450:] = INF
    lanes = parameters(50, 7, 450)
    lane, index = lanes_and_indices(20, 50, 7)
    found = draw_rows(wide[:, :450], lane_R=lane, index_R=index, **lanes, part_len=PART_LEN)
    assert found.tolist() == reference(wide[:, :450].contiguous(), lane, index, lanes).tolist()


def test_no_rows():
    empty = torch.empty(0, dtype=torch.int64, device=options.device)
    logits = torch.empty(0, 30, device=options.device)
    assert draw_rows(logits, lane_R=empty, index_R=empty, **one_lane()).shape == (0,)


@pytest.mark.cuda
@pytest.mark.parametrize("num_columns", [32_000, 151_936])
def test_draws_at_the_size_of_a_vocabulary(num_columns):
    """Sums over 150,000 probabilities and noise are rounded differently: a draw or two of 1,200 may fall on the other side."""
    lanes = parameters(1200, 11, num_columns)
    lane = torch.arange(1200, device="cuda")
    _, index = lanes_and_indices(1200, 1200, 11)
    logits = random_logits(1200, num_columns, 11)
    differing = 0
    for chunk in range(0, 1200, 100):
        rows = slice(chunk, chunk + 100)
        drawn = draw_rows(logits[rows], lane_R=lane[rows], index_R=index[rows], **lanes)
        differing += int((drawn != reference(logits[rows], lane[rows], index[rows], lanes)).sum())
    assert differing <= 2


@pytest.mark.cuda
def test_a_captured_draw_follows_its_inputs():
    lanes = parameters(64, 13, 4000)
    lane, index = lanes_and_indices(16, 64, 13)
    logits = random_logits(16, 4000, 13)
    draw_rows(logits, lane_R=lane, index_R=index, **lanes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = draw_rows(logits, lane_R=lane, index_R=index, **lanes)
    for seed in (14, 15):
        logits.copy_(random_logits(16, 4000, seed))
        new_lane, new_index = lanes_and_indices(16, 64, seed)
        lane.copy_(new_lane)
        index.copy_(new_index)
        graph.replay()
        assert drawn.tolist() == reference(logits, lane, index, lanes).tolist()
