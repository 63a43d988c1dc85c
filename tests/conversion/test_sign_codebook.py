import itertools

import pytest
import torch
from sign_problems import random_metric, random_signs

from hf_vqlogits.conversion import sign_codebook
from hf_vqlogits.conversion.sign_codebook import solve_codebook


def exact(metric, signs):
    """Least squares on all R D unknowns at once, float64."""
    tokens, bits = signs.shape
    size = metric.rows.shape[1]
    eye = torch.eye(size, dtype=torch.float64)
    matrix = torch.zeros(bits * size, bits * size, dtype=torch.float64)
    right = torch.zeros(bits * size, dtype=torch.float64)
    for v in range(tokens):
        m, s, x = metric.context[v].double(), signs[v].double(), metric.rows[v].double()
        local = metric.weight[v].double() * (eye + torch.outer(m, m))
        matrix += torch.kron(torch.outer(s, s), local)
        right += torch.kron(s, local @ x)
    return torch.linalg.solve(matrix, right).reshape(bits, size)


def total_error(metric, signs, codebook):
    return metric.error(metric.rows - signs.float() @ codebook).sum()


def test_converges_to_the_exact_solution(monkeypatch):
    monkeypatch.setattr(sign_codebook, "TILE", 13)
    metric, signs = random_metric(60, 4), random_signs(60, 5)
    codebook = solve_codebook(metric, signs, torch.zeros(5, 4), iterations=25)
    torch.testing.assert_close(codebook, exact(metric, signs).float(), rtol=1e-3, atol=1e-4)


def test_one_iteration_is_exact_where_all_tokens_share_a_metric():
    metric, signs = random_metric(60, 4), random_signs(60, 5)
    metric.context[:] = metric.context[0]
    codebook = solve_codebook(metric, signs, torch.zeros(5, 4), iterations=1)
    torch.testing.assert_close(codebook, exact(metric, signs).float(), rtol=1e-3, atol=1e-3)


def test_error_falls_with_every_iteration():
    metric, signs = random_metric(300, 20), random_signs(300, 12)
    metric.context *= 0.4  # as uneven as the metrics of trained models
    start = torch.randn(12, 20)
    errors = [
        total_error(metric, signs, solve_codebook(metric, signs, start, iterations=i))
        for i in range(5)
    ]
    assert all(after < before for before, after in itertools.pairwise(errors))
    # Four preconditioned iterations leave next to nothing to gain.
    best = total_error(metric, signs, exact(metric, signs).float())
    assert float(errors[-1]) == pytest.approx(float(best), rel=0.01)


@pytest.mark.parametrize("bits", [3, 40])
def test_equal_and_constant_bits_and_more_bits_than_tokens_stay_finite(bits):
    metric, signs = random_metric(30, 4), random_signs(30, bits)
    signs[:, 1] = signs[:, 0]
    signs[:, 2] = 1
    codebook = solve_codebook(metric, signs, torch.zeros(bits, 4), iterations=8)
    assert torch.isfinite(codebook).all()
    assert total_error(metric, signs, codebook) < total_error(metric, signs, codebook * 0)


def test_zero_rows_have_a_zero_codebook():
    metric, signs = random_metric(30, 4), random_signs(30, 3)
    metric.rows.zero_()
    assert not solve_codebook(metric, signs, torch.zeros(3, 4), iterations=4).any()
