"""Noise keys: pinned, distinct, and random without a seed."""

from medusa_core.scheduler.noise import _mix, noise_key

# A change here changes the output of every seeded request.
PINNED = [0xA706DD2F4D197E6F, 0x2A98F501AF37E97F, 0x5E41AB087439611E, 0x5DC20AA7B2A27137]


def test_the_mixer_is_splitmix64():
    """First outputs of the published generator for state 0."""
    golden_gamma = 0x9E3779B97F4A7C15
    states = [0, golden_gamma, 2 * golden_gamma]
    assert [_mix(state) for state in states] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_keys_are_pinned():
    assert [noise_key(seed, choice) for seed, choice in [(0, 0), (0, 1), (1, 0), (-1, 0)]] == PINNED


def test_seeds_and_choices_give_distinct_64_bit_keys():
    keys = {noise_key(seed, choice) for seed in range(-50, 50) for choice in range(16)}
    assert len(keys) == 1600
    assert all(0 <= key < 2**64 for key in keys)


def test_without_a_seed_keys_are_fresh():
    assert len({noise_key(None, 0) for _ in range(20)}) == 20
