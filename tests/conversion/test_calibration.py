import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vqlogits.conversion import calibration
from hf_vqlogits.conversion.calibration import (
    CalibrationStatistics,
    StatisticsAccumulator,
)
from hf_vqlogits.conversion.redrawing import draw_tokens

V, D = 37, 6


def data(positions=100, *, vocab=V, size=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, size, generator=generator)
    hidden = 3 * torch.randn(1, size, generator=generator) + torch.randn(
        positions, size, generator=generator
    )
    return weight, hidden, torch.randn(vocab, generator=generator)


def reference(weight, hidden, bias, scale, cap):
    """Statistics by definition, in float64; the slope by autograd."""
    raw = (hidden.double() @ weight.double().T + bias.double()).requires_grad_()
    final = raw * scale if cap is None else cap * torch.tanh(raw * scale / cap)
    (slope,) = torch.autograd.grad(final.sum(), raw)
    slope = slope / scale
    p = final.softmax(-1).detach()
    fisher = p * (1 - p) * slope**2
    return p, fisher, fisher.T @ hidden.double() / fisher.sum(0)[:, None]


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (0.5, 4.0)])
def test_statistics_are_those_of_the_definition(scale, cap):
    weight, hidden, bias = data()
    accumulator = StatisticsAccumulator(
        weight,
        bias=bias,
        logit_scale=scale,
        final_logit_softcapping=cap,
        dtype=torch.float32,
    )
    for batch in (hidden[:3], *hidden[3:].split(17)):
        accumulator.update(batch)
    found = accumulator.finish()
    p, fisher, context = reference(weight, hidden, bias, scale, cap)
    centred = hidden.double() - hidden.double().mean(0)
    torch.testing.assert_close(found.mean, hidden.double().mean(0))
    torch.testing.assert_close(found.covariance, centred.T @ centred / len(hidden))
    torch.testing.assert_close(found.probability, p.sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.fisher, fisher.sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.context.double(), context, rtol=1e-3, atol=1e-3)
    assert found.positions == len(hidden)
    assert found.shift_invariant == (cap is None)


def test_bfloat16_products_give_nearly_the_same():
    weight, hidden, bias = data(4000)
    weight /= 4
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        accumulator = StatisticsAccumulator(weight, bias=bias, dtype=dtype)
        accumulator.update(hidden)
        found.append(accumulator.finish())
    exact, near = found
    torch.testing.assert_close(near.fisher, exact.fisher, rtol=0.01, atol=0)
    # A context is a mean: roundings of hidden states, 2^-9 of their size, average out.
    torch.testing.assert_close(near.context, exact.context, rtol=0, atol=0.02)
    assert torch.equal(near.covariance, exact.covariance)


def test_tokens_are_drawn_from_the_models_distribution(monkeypatch):
    monkeypatch.setattr(calibration, "CHUNK_BYTES", 4 * V * 6_000)
    weight, hidden, bias = data(1)
    plain, drawing = (StatisticsAccumulator(weight, bias=bias) for _ in range(2))
    many = hidden.expand(20_000, -1)
    plain.update(many)
    generator, parts = torch.Generator().manual_seed(0), []
    drawing.update(many, lambda p: parts.append(draw_tokens(p, generator)))
    drawn = torch.cat(parts)
    assert len(parts) > 1
    assert torch.equal(plain.finish().fisher, drawing.finish().fisher)
    shares = drawn.bincount(minlength=V).double() / len(many)
    expected = plain.finish().probability / len(many)
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.015)


def test_a_scale_of_the_logits_changes_no_statistic():
    weight, hidden, bias = data()
    found = []
    for scale in (1.0, 16.0):
        accumulator = StatisticsAccumulator(
            scale * weight, bias=scale * bias, logit_scale=1 / scale
        )
        accumulator.update(hidden)
        found.append(accumulator.finish())
    torch.testing.assert_close(found[0].fisher, found[1].fisher, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0].context, found[1].context, rtol=1e-3, atol=1e-3)


def test_covariance_keeps_its_digits_beside_a_huge_mean():
    weight, hidden, _ = data(500)
    hidden[:, 0] += 1e4
    accumulator = StatisticsAccumulator(weight * 1e-4)
    for batch in hidden.split(100):
        accumulator.update(batch)
    expected = hidden.double().T.cov(correction=0)
    torch.testing.assert_close(accumulator.finish().covariance, expected, rtol=1e-6, atol=1e-9)


def test_half_precision_weights_are_accepted():
    weight, hidden, _ = data()
    results = []
    for w in (weight.bfloat16(), weight.bfloat16().float()):
        accumulator = StatisticsAccumulator(w)
        accumulator.update(hidden.bfloat16())
        results.append(accumulator.finish())
    assert torch.equal(results[0].fisher, results[1].fisher)


def test_token_without_any_probability_gets_the_mean_as_context():
    weight, hidden, _ = data()
    bias = torch.zeros(V)
    bias[5] = -1e4
    accumulator = StatisticsAccumulator(weight, bias=bias)
    accumulator.update(hidden)
    found = accumulator.finish()
    assert found.fisher[5] == 0
    torch.testing.assert_close(found.context[5], found.mean.float())


def statistics(positions, size=D, **changes):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(positions, size, generator=generator, dtype=torch.float64) + 2
    values = {
        "positions": positions,
        "mean": hidden.mean(0),
        "covariance": hidden.T.cov(correction=0).reshape(size, size),
        "fisher": torch.ones(V),
        "context": torch.zeros(V, size),
        "probability": torch.ones(V),
    }
    return hidden, CalibrationStatistics(**values | changes)


def test_fold_direction_is_the_least_squares_one():
    hidden, found = statistics(100_000)
    ones = torch.ones(len(hidden), 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(hidden, ones)
    torch.testing.assert_close(found.fold_direction(), expected.solution[:, 0], rtol=0, atol=1e-3)
    residual = (hidden @ expected.solution - 1).square().mean()
    left = float(1 - found.fold_direction() @ found.mean)
    assert left == pytest.approx(float(residual), rel=0.02)


def test_folding_does_nothing_without_a_mean():
    _, found = statistics(100, mean=torch.zeros(D, dtype=torch.float64))
    assert not found.fold_direction().any()


@settings(max_examples=25, deadline=None)
@given(
    positions=st.integers(1, 40), size=st.integers(1, 12), scale=st.sampled_from([1e-4, 1.0, 1e4])
)
def test_regularised_covariance_can_always_be_inverted(positions, size, scale):
    _, found = statistics(positions, size)
    found.covariance *= scale
    values = torch.linalg.eigvalsh(found.regularised_covariance())
    assert values[0] > 0
    assert values[-1] / values[0] < 1.1e7


def test_shrinkage_fades_with_more_text():
    few, many = statistics(20)[1], statistics(20_000)[1]
    share = [
        (s.regularised_covariance() - s.covariance).norm() / s.covariance.norm()
        for s in (few, many)
    ]
    assert share[1] < 0.02 < 0.2 < share[0]


def test_wrong_input_is_refused():
    weight, hidden, bias = data()
    with pytest.raises(ValueError, match=r"`weight` must be \(V, d\)"):
        StatisticsAccumulator(weight[0])
    with pytest.raises(ValueError, match=r"`bias` must be \(37,\)"):
        StatisticsAccumulator(weight, bias=bias[:-1])
    accumulator = StatisticsAccumulator(weight)
    with pytest.raises(ValueError, match="No hidden states were added"):
        accumulator.finish()
    with pytest.raises(ValueError, match=r"`hidden` must be \(n, 6\)"):
        accumulator.update(hidden[:, :-1])
    hidden[3, 2] = torch.inf
    with pytest.raises(ValueError, match="hidden states hold NaN or infinity; convert it in"):
        accumulator.update(hidden)
