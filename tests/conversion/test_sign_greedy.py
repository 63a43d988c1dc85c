import pytest
import torch
from sign_problems import random_metric

from hf_vqlogits.conversion import sign_greedy
from hf_vqlogits.conversion.sign_greedy import extend_greedily


def greedy(metric, bits, *, start=None, seed=0):
    tokens, size = metric.rows.shape
    signs, codebook = start or (
        torch.empty(tokens, 0, dtype=torch.int8),
        torch.empty(0, size),
    )
    generator = torch.Generator().manual_seed(seed)
    return extend_greedily(metric, signs, codebook, bits, generator=generator)


def relative_error(metric, signs, codebook):
    def total(difference):
        return (metric.weight[:, None] * difference.square()).sum()

    return float(total(metric.rows - signs.float() @ codebook) / total(metric.rows))


def rank_one_steps(metric, bits):
    """One bit at a time, each from the exact leading direction of the whole residual."""
    residual, weight = metric.rows.clone(), metric.weight[:, None]
    for _ in range(bits):
        direction = torch.linalg.eigh(residual.T @ (weight * residual))[1][:, -1]
        for _ in range(3):
            sign = torch.where(residual @ direction < 0, -1.0, 1.0)
            direction = residual.T @ (metric.weight * sign)
        residual.addr_(sign, direction, alpha=-1)
    return float((weight * residual.square()).sum() / (weight * metric.rows.square()).sum())


@pytest.mark.parametrize(("size", "bits"), [(48, 24), (24, 48)])
def test_blocks_are_nearly_as_good_as_single_steps(size, bits):
    metric = random_metric(1500, size)
    metric.rows *= torch.arange(1, size + 1).rsqrt()  # hidden states of models vary unevenly
    single = rank_one_steps(metric, bits)
    blocks = relative_error(metric, *greedy(metric, bits))
    assert blocks < 1.06 * single


def test_prefix_is_a_coarser_code():
    metric = random_metric(500, 20)
    signs, codebook = greedy(metric, 40)
    errors = [relative_error(metric, signs[:, :n], codebook[:n]) for n in (8, 16, 24, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


def test_extension_keeps_what_was_there():
    metric = random_metric(200, 20)
    first = greedy(metric, 16)
    signs, codebook = greedy(metric, 30, start=first)
    assert torch.equal(signs[:, :16], first[0])
    assert torch.equal(codebook[:16], first[1])
    assert signs.shape == (200, 30)
    assert codebook.shape == (30, 20)
    assert relative_error(metric, signs, codebook) < relative_error(metric, *first)


def test_heavy_tokens_are_served_first():
    metric = random_metric(400, 30)
    metric.weight[:] = 1e-6
    metric.weight[:20] = 1
    metric.weight /= metric.weight.sum()
    signs, codebook = greedy(metric, 30)
    share = (metric.rows - signs.float() @ codebook).square().sum(1) / metric.rows.square().sum(1)
    assert share[:20].mean() < 0.1 * share[20:].mean()


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("size", [2, 5])
def test_more_bits_than_useful_stay_finite(tokens, size):
    metric = random_metric(tokens, size)
    signs, codebook = greedy(metric, 64)
    assert set(signs.unique().tolist()) <= {-1, 1}
    assert torch.isfinite(codebook).all()
    assert relative_error(metric, signs, codebook) < 0.01


def test_zero_rows_stay_finite():
    metric = random_metric(50, 5)
    metric.rows.zero_()
    _, codebook = greedy(metric, 10)
    assert not codebook.any()


def test_block_never_exceeds_the_coordinates(monkeypatch):
    monkeypatch.setattr(sign_greedy, "BLOCK", 1000)
    signs, _ = greedy(random_metric(50, 5), 12)
    assert signs.shape == (50, 12)
