import pytest
import torch

from benchmarks.peers.gptq import gptq
from benchmarks.peers.grid import fit_grid, round_to_nearest


def moment(size: int) -> torch.Tensor:
    torch.manual_seed(1)
    mixing = torch.randn(size, size, dtype=torch.float64)
    return mixing @ mixing.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("search", [False, True])
def test_with_equal_independent_inputs_it_rounds_to_nearest(search):
    weight = torch.randn(20, 192)
    made = gptq(weight, torch.eye(192, dtype=torch.float64), 3, search=search)
    nearest = round_to_nearest(weight, 3, search=search)
    torch.testing.assert_close(made.weight, nearest.weight, rtol=0, atol=0)
    assert made.total_bytes == nearest.total_bytes


def test_against_a_float64_reference():
    """Optimal brain quantisation, which inverts the remaining moments at every step."""
    torch.manual_seed(0)
    weight, second = torch.randn(7, 96), moment(96)
    grid = fit_grid(weight, 3, group=32, search=True)
    damped = second + 0.01 * second.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    left = damped.diagonal().argsort(descending=True)
    rows = weight.double().clone()
    while len(left):
        inverse = torch.linalg.inv(damped[left][:, left])
        column = int(left[0])
        rounded = grid.nearest(rows[:, column].float(), column // 32).double()
        lost = (rows[:, column] - rounded) / inverse[0, 0]
        rows[:, left] -= lost[:, None] * inverse[0]
        rows[:, column] = rounded
        left = left[1:]
    made = gptq(weight, second, 3, group=32).weight
    assert (made.double() - rows).abs().gt(1e-5).float().mean() < 0.01  # ties fall either way


def test_logits_lose_less_than_by_rounding():
    torch.manual_seed(0)
    weight, second = torch.randn(50, 128), moment(128)

    def lost(made: torch.Tensor) -> float:
        error = (made - weight).double()
        return float(((error @ second) * error).sum())

    nearest = round_to_nearest(weight, 3, search=True).weight
    assert lost(gptq(weight, second, 3).weight) < 0.75 * lost(nearest)
