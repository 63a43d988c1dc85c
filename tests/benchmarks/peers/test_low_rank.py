import pytest
import torch

from benchmarks.peers.low_rank import factors, low_rank


def moment(size: int) -> torch.Tensor:
    mixing = torch.randn(size, size, dtype=torch.float64)
    return mixing @ mixing.T + 0.1 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("whitened", [False, True])
def test_full_rank_is_exact(whitened):
    torch.manual_seed(0)
    weight = torch.randn(30, 8)
    left, right = factors(weight, 8, moment(8) if whitened else None)
    torch.testing.assert_close(left @ right, weight.double())


def test_plain_loses_what_the_small_singular_values_hold():
    torch.manual_seed(0)
    weight = torch.randn(30, 8)
    left, right = factors(weight, 3)
    expected = torch.linalg.svdvals(weight.double())[3:].square().sum()
    torch.testing.assert_close((left @ right - weight.double()).square().sum(), expected)


def test_whitened_loses_least_in_the_logits():
    torch.manual_seed(0)
    weight, second = torch.randn(30, 8), moment(8)
    left, right = factors(weight, 3, second)
    error = left @ right - weight.double()
    root = torch.linalg.cholesky(second)
    expected = torch.linalg.svdvals(weight.double() @ root)[3:].square().sum()
    torch.testing.assert_close(((error @ second) * error).sum(), expected)


def test_bytes_and_rounding():
    torch.manual_seed(0)
    weight = torch.randn(30, 8)
    made = low_rank(weight, 3)
    assert made.total_bytes == 2 * (30 * 3 + 3 * 8)
    left, right = factors(weight, 3)
    torch.testing.assert_close(made.weight, (left @ right).float(), rtol=0, atol=0.05)
    assert made.bias is None
