import pytest
import torch

from benchmarks.peers.grid import SHARES, fit_grid, round_to_nearest


def test_against_a_float64_reference():
    torch.manual_seed(0)
    weight = torch.randn(5, 128)
    made = round_to_nearest(weight, 3).weight
    for row, got in zip(weight.view(-1, 64), made.view(-1, 64), strict=True):
        scale = ((row.max() - row.min()) / 7).half().double()
        zero = (-row.min().double() / scale).round()
        codes = ((row.double() / scale).round() + zero).clamp(0, 7)
        torch.testing.assert_close(got.double(), (codes - zero) * scale, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bytes(bits):
    made = round_to_nearest(torch.randn(10, 192), bits)
    groups = 10 * 3
    assert made.total_bytes == 10 * 192 * bits // 8 + groups * 2 + -(-groups * bits // 8)


def test_a_searched_range_loses_less_and_is_one_of_the_shares():
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    plain, searched = fit_grid(weight, 2), fit_grid(weight, 2, search=True)
    shares = searched.scale / plain.scale
    assert ((shares - torch.tensor(SHARES)).abs() < 1e-2).any(1).all()
    loss = {
        search: (round_to_nearest(weight, 2, search=search).weight - weight).square().sum(1)
        for search in (False, True)
    }
    assert (loss[True] <= loss[False]).all()
    assert loss[True].sum() < 0.8 * loss[False].sum()


def test_groups_of_one_sign_and_of_zeros():
    weight = torch.cat([torch.zeros(1, 64), torch.linspace(1, 2, 64)[None]])
    made = round_to_nearest(weight, 4).weight
    assert made[0].eq(0).all()
    assert (made[1] - weight[1]).abs().max() < 2 / 15  # 0 is in the range


def test_a_group_that_does_not_fit():
    with pytest.raises(ValueError, match="`group` 64 does not divide the 100 columns"):
        fit_grid(torch.randn(3, 100), 4)
