import importlib.util
import warnings

import pytest
import torch

from tunesmith.training.blockwise import BLOCK, count_blocks, dequantize, list_levels, make_levels, quantize


@pytest.mark.parametrize("signed", [True, False])
def test_there_are_256_levels_from_minus_one_or_zero_to_one(signed):
    levels = list_levels(signed=signed)
    assert len(set(levels)) == 256
    assert levels == sorted(levels)
    assert levels[-1] == 1.0
    # The largest negative one is the middle of the last of 64 parts of [0.1, 1]: 1 - 0.9 / 128.
    assert levels[0] == (pytest.approx(-0.99296875) if signed else 0.0)
    if not signed:
        assert levels[1:3] == pytest.approx([3.25e-7, 7.75e-7])


@pytest.mark.parametrize("signed", [True, False])
def test_the_levels_are_those_of_bitsandbytes(signed):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes.functional import create_dynamic_map
    torch.testing.assert_close(
        make_levels(torch.device("cpu"), signed=signed).values,
        create_dynamic_map(signed=signed),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("signed", [True, False])
def test_the_tables_find_what_a_binary_search_finds(device, signed):
    levels = make_levels(torch.device(device), signed=signed)
    small = torch.logspace(-9, 0, 200_000)
    x = torch.cat(
        (small, torch.rand(200_000), levels.values.cpu(), levels.middles[:-1].cpu(), torch.zeros(1))
    )
    x = torch.cat((x, -x)) if signed else x
    expected = torch.bucketize(x.to(device), levels.middles[:-1]).to(torch.uint8)
    assert torch.equal(levels.nearest(x.to(device)), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_a_value_comes_back_within_half_a_level(device, signed):
    x = torch.randn(64, BLOCK, generator=torch.Generator().manual_seed(0)).to(device)
    x = x if signed else x.square()
    levels = make_levels(torch.device(device), signed=signed)
    codes, scales = quantize(x, levels)
    assert codes.dtype == torch.uint8
    assert torch.equal(scales, x.abs().amax(1, keepdim=True))
    # The widest gap is in the top decade: 0.9 / 64 with a sign, 0.9 / 128 without.
    widest = 0.9 / (64 if signed else 128)
    assert ((dequantize(codes, scales, levels) - x).abs() / scales).max() <= widest / 2 + 1e-6


def test_a_block_of_zeros_stays_zero_and_the_largest_value_is_exact():
    levels = make_levels(torch.device("cpu"), signed=False)
    x = torch.zeros(2, BLOCK)
    x[1, 7] = 0.3
    assert torch.equal(dequantize(*quantize(x, levels), levels), x)


def test_an_outlier_spoils_its_own_block_only():
    levels = make_levels(torch.device("cpu"), signed=True)
    x = torch.full((2, BLOCK), 1e-3)
    x[0, 0] = 1e6
    back = dequantize(*quantize(x, levels), levels)
    assert back[0, 1] == 0.0
    assert torch.equal(back[1], x[1])


def test_the_last_block_may_be_short():
    assert [count_blocks(n) for n in (1, 256, 257)] == [1, 1, 2]
