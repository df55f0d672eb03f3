import torch

from softgen.random import SampleRandom, derive_seed

CPU = torch.device("cpu")


def test_seeds_are_pinned() -> None:
    assert derive_seed(0) == 4246866556266386882
    assert derive_seed(3, "teacher", 17) != derive_seed(3, "teacher", 18)
    assert 0 <= derive_seed("anything") < 2**63


def test_a_samples_draws_depend_on_its_ordinal_alone() -> None:
    whole = SampleRandom(5, [7, 8, 9], device=CPU)
    part = SampleRandom(5, [9], device=CPU)
    for draw in ("uniform", "normal"):
        assert torch.equal(getattr(whole, draw)(4)[2:], getattr(part, draw)(4))
    assert torch.equal(whole.integers(10, 6)[2:], part.integers(10, 6))
    assert len(whole) == 3


def test_streams_differ_between_samples_seeds_and_calls() -> None:
    rows = torch.cat([SampleRandom(seed, [0, 1], device=CPU).uniform(3) for seed in (0, 1)])
    assert len(rows.unique()) == 12
    noise = SampleRandom(0, [0], device=CPU)
    assert not torch.equal(noise.uniform(3), noise.uniform(3))


def test_draws_are_float32_whatever_the_default_is() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        noise = SampleRandom(0, range(2), device=CPU)
        draws, codes = noise.uniform(4096), noise.integers(16384, 4096)
    finally:
        torch.set_default_dtype(torch.float32)
    assert draws.dtype == torch.float32
    assert len(codes.unique()) > 4096


def test_shapes_ranges_and_moments() -> None:
    noise = SampleRandom(0, range(50), device=CPU)
    assert noise.uniform().shape == (50,)
    uniform, normal, integers = noise.uniform(20, 30), noise.normal(600), noise.integers(7, 600)
    assert uniform.shape == (50, 20, 30)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(normal.mean().item()) < 0.02
    assert abs(normal.var().item() - 1) < 0.04
    frequencies = torch.bincount(integers.flatten(), minlength=7) / integers.numel()
    assert integers.dtype == torch.int64
    torch.testing.assert_close(frequencies, torch.full((7,), 1 / 7), rtol=0, atol=0.01)


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state()
    draws = SampleRandom(0, [0], device=CPU).uniform(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(SampleRandom(0, [0], device=CPU).uniform(3), draws)
