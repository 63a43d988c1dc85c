import math

import pytest
import torch

from benchmarks.rate_distortion import GaussianSource, compare, sources
from hf_vqlogits.conversion.metric import TokenMetric


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def source_of(variances: torch.Tensor, weights: torch.Tensor) -> GaussianSource:
    """With shares of the variances' own sum."""
    return GaussianSource(variances, weights, float(variances.sum()))


@pytest.mark.parametrize("bits", [0.0, 0.5, 3.0, 40.0, 200.0])
def test_a_white_source(bits):
    source = source_of(torch.ones(7, dtype=torch.float64), double(1))
    assert source.distortion(bits) == pytest.approx(2 ** (-2 * bits / 7), rel=1e-9)


def test_a_component_too_small_for_bits():
    # The level reaches the second component, 1, once the first has log2(16) / 2 = 2 bits.
    source = source_of(double(16, 1), double(1))
    assert source.distortion(1) == pytest.approx((4 + 1) / 17)
    assert source.distortion(2) == pytest.approx((1 + 1) / 17)
    assert source.distortion(5) == pytest.approx(2 * 4 * 2**-5 / 17)


def test_spread_over_two_tokens():
    # Level t = sqrt(w1 w2) 2^(-2 R) once both have bits; before, the first has 2 R of them.
    source = source_of(double(1), double(0.8, 0.2))
    assert source.distortion(2) == pytest.approx(2 * math.sqrt(0.8 * 0.2) * 2**-4)
    assert source.distortion(0.25) == pytest.approx(0.8 * 2**-1 + 0.2)


def test_spreading_helps_unless_weights_are_equal():
    torch.manual_seed(0)
    variances = torch.rand(9, dtype=torch.float64).sort(descending=True)[0]
    fixed = source_of(variances, double(1))
    equal = source_of(variances, torch.full((5,), 0.2, dtype=torch.float64))
    unequal = source_of(variances, double(0.6, 0.2, 0.1, 0.05, 0.05))
    for bits in (0.7, 6.0, 60.0):
        assert equal.distortion(bits) == pytest.approx(fixed.distortion(bits), rel=1e-9)
        assert unequal.distortion(bits) < 0.9 * fixed.distortion(bits)


@pytest.mark.parametrize("weights", [double(1), double(0.7, 0.2, 0.1)])
def test_bits_invert_the_distortion(weights):
    source = source_of(double(5, 3, 1, 0.01), weights)
    for bits in (0.3, 2.0, 25.0):
        assert source.bits(source.distortion(bits)) == pytest.approx(bits, rel=1e-9)
    assert source.bits(1.0) == pytest.approx(0, abs=1e-9)


def test_no_rate_of_the_same_form_does_better():
    """Random allocations of the same bits to components and tokens lose more."""
    torch.manual_seed(1)
    variances, weights = double(4, 2, 0.5), double(0.5, 0.3, 0.2)
    source = source_of(variances, weights)
    bound = source.distortion(3)
    for _ in range(200):
        rates = torch.rand(3, 3, dtype=torch.float64)
        rates *= 3 * len(weights) / rates.sum()
        error = (weights[:, None] * variances * 2 ** (-2 * rates)).sum() / variances.sum()
        assert error >= bound


def metric(tokens: int = 40, size: int = 6) -> TokenMetric:
    torch.manual_seed(0)
    weight = torch.rand(tokens) + 0.1
    return TokenMetric(
        rows=torch.randn(tokens, size),
        weight=weight / weight.sum(),
        context=torch.randn(tokens, size),
        unwhiten=torch.eye(size - 1),
        mean=torch.zeros(size - 1),
    )


def test_sources_of_a_metric_against_float64_sums():
    some = metric()
    covariance = torch.zeros(6, 6, dtype=torch.float64)
    unit = 0.0
    for row, weight, context in zip(some.rows, some.weight, some.context, strict=True):
        row, weight = row.double(), weight.double()
        covariance += weight * torch.outer(row, row)
        unit += float(weight * (row @ row + (context.double() @ row) ** 2))
    found = sources(some)
    for source in found.values():
        expected = torch.linalg.eigvalsh(covariance).flip(0)
        torch.testing.assert_close(source.variances, expected)
        assert source.unit == pytest.approx(unit, rel=1e-5)
        assert source.distortion(0) == pytest.approx(float(expected.sum()) / unit, rel=1e-5)
        assert source.bits(1.0) == pytest.approx(0, abs=1e-9)
    assert found["fixed"].weights.tolist() == [1]
    assert len(found["spread"].weights) == 40


def test_the_error_of_any_codes_is_at_least_that_without_contexts():
    some = metric()
    change = torch.randn(40, 6)
    assert (some.error(change) >= some.weight * change.square().sum(1)).all()


def test_comparison():
    bounds = {"fixed": source_of(torch.ones(4, dtype=torch.float64), double(1))}
    found = compare(bounds, 4, 0.5)
    assert found == pytest.approx(
        {
            "error": 0.5,
            "fixed_bound": 0.25,
            "error_over_fixed_bound": 2.0,
            "fixed_bits_at_error": 2.0,
        }
    )


def test_impossible_questions():
    source = source_of(double(1), double(1))
    with pytest.raises(ValueError, match="`bits` must be at least 0, got -1"):
        source.distortion(-1)
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match=f"must lie in .*got {share}"):
            source.bits(share)
