from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import random_data, random_mixture

from hf_vqlogits.gates import ACTIVATIONS, gate_scores
from hf_vqlogits.gaussian_moe.em import em, expert_step, floored, gate_features, gate_step
from hf_vqlogits.gaussian_moe.starts import perturbed
from hf_vqlogits.gaussian_moe.temperature import TemperatureSchedule

FLOOR = 1e-3


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    activation=st.sampled_from(list(ACTIVATIONS)),
    learn=st.booleans(),
    k=st.integers(1, 4),
    p=st.integers(1, 2),
)
def test_no_step_lowers_the_likelihood(seed, activation, learn, k, p):
    true = random_mixture(activation, k=2, p=p, seed=seed)
    x, y = random_data(true, n=60, seed=seed)
    begin = random_mixture(activation, k=k, p=p, seed=seed + 1)
    history = em(
        begin, x, y, min_deviation=FLOOR, learn_temperature=learn, steps=25, tolerance=0.0
    ).history
    assert torch.isfinite(history).all()
    assert (history.diff(dim=0) > -1e-7).all()


def test_expert_step_is_weighted_least_squares():
    mixture = random_mixture(k=2)
    x, y = random_data(mixture)
    shares = torch.rand(40, 2, dtype=torch.float64)
    found = expert_step(mixture, x, y, shares, FLOOR)
    inputs = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
    for i in range(2):
        root = shares[:, i].sqrt()[:, None]
        solution = torch.linalg.lstsq(root * inputs, root * y).solution
        torch.testing.assert_close(found.coefficients[i], solution[:2].T)
        torch.testing.assert_close(found.intercepts[i], solution[2])
        residuals = root * (y - inputs @ solution)
        expected = residuals.T @ residuals / shares[:, i].sum()
        torch.testing.assert_close(found.covariances[i], expected)


def test_gate_step_finds_the_logistic_regression():
    mixture = random_mixture(k=3)
    x, _ = random_data(mixture, n=200)
    shares = torch.randn(200, 3, dtype=torch.float64).softmax(-1)
    found = mixture
    for _ in range(30):
        found = gate_step(found, x, shares, learn_temperature=False)
    slopes, biases = (t.clone().requires_grad_() for t in (found.slopes, found.biases))
    scores = gate_scores(x, slopes, biases, found.log_temperature, "linear")
    objective = (shares * scores.log_softmax(-1)).sum()
    gradients = torch.autograd.grad(objective, (slopes, biases))
    assert max(float(g.abs().max()) for g in gradients) < 1e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_features_are_derivatives(activation):
    mixture = random_mixture(activation, k=2)
    x, _ = random_data(mixture, n=3)
    features, by_log_tau = gate_features(mixture, x)

    def scores(slopes, biases, log_temperature):
        return gate_scores(x, slopes, biases, log_temperature, activation)

    given_ = (mixture.slopes, mixture.biases, mixture.log_temperature)
    by_slopes, by_biases, by_tau = torch.autograd.functional.jacobian(scores, given_)
    for i in range(2):
        torch.testing.assert_close(features[i, :2].T, by_slopes[:, i, i])
        torch.testing.assert_close(features[i, 2], by_biases[:, i, i])
    shift = by_log_tau.T - by_tau
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift))


def test_recovers_the_truth():
    true = random_mixture("linear", d=1, p=1, k=2, seed=3)
    x, y = random_data(true, n=4000)
    begin = perturbed(true, 0.2, torch.Generator().manual_seed(0))
    result = em(begin, x, y, min_deviation=FLOOR, steps=300)
    assert result.converged
    assert result.log_likelihood >= true.log_density(x, y).mean()
    torch.testing.assert_close(result.mixture.coefficients, true.coefficients, atol=0.15, rtol=0.0)


def test_many_at_once_are_as_one_by_one():
    true = random_mixture("gelu", batch=(3,))
    x, y = random_data(true, n=50)
    together = em(true, x, y, min_deviation=FLOOR, steps=5, tolerance=0.0)
    for i in range(3):
        alone = em(
            true.map(lambda t, i=i: t[i]), x[i], y[i], min_deviation=FLOOR, steps=5, tolerance=0.0
        )
        torch.testing.assert_close(together.history[:, i], alone.history)


@pytest.mark.parametrize("p", [1, 2])
def test_a_component_on_one_value_is_held_at_the_floor(p):
    true = random_mixture(p=p, k=2)
    x, y = random_data(true, n=60)
    y[:20] = 5.0  # twenty times the same y, which a component can hit exactly
    begin = random_mixture(p=p, k=2)
    shares = torch.zeros(60, 2, dtype=torch.float64)
    shares[:20, 0] = shares[20:, 1] = 1
    begin = expert_step(begin, x, y, shares, 0.05)
    result = em(begin, x, y, min_deviation=0.05, steps=50)
    least = torch.linalg.svdvals(result.mixture.factors).amin(-1)
    assert least[0] == pytest.approx(0.05, rel=1e-6)
    assert least[1] > 0.06
    assert torch.isfinite(result.history).all()
    assert (result.history.diff(dim=0) > -1e-8).all()


def test_a_component_without_observations_keeps_its_expert():
    mixture = random_mixture(k=2)
    x, y = random_data(mixture)
    shares = torch.tensor([1.0, 0.0]).double().expand(40, 2)
    found = expert_step(mixture, x, y, shares, FLOOR)
    for name in ("coefficients", "intercepts", "factors"):
        assert torch.equal(getattr(found, name)[1], getattr(mixture, name)[1])
        assert not torch.equal(getattr(found, name)[0], getattr(mixture, name)[0])
        assert torch.isfinite(getattr(found, name)).all()


def test_the_gate_of_a_component_without_observations_closes():
    mixture = random_mixture(k=2)
    x, y = random_data(mixture)
    intercepts = mixture.intercepts.clone()
    intercepts[1] = 1e4  # so far that no observation can be its own
    result = em(replace(mixture, intercepts=intercepts), x, y, min_deviation=FLOOR, steps=100)
    assert torch.equal(result.mixture.intercepts[1], intercepts[1])
    assert float(result.mixture.log_gates(x).exp()[:, 1].max()) < 1e-3
    assert torch.isfinite(result.history).all()


def test_floor_raises_only_what_is_below():
    covariance = torch.diag(torch.tensor([4.0, 1e-9]).double())
    torch.testing.assert_close(
        floored(covariance, 0.1), torch.diag(torch.tensor([2.0, 0.1])).double()
    )
    fine = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    torch.testing.assert_close(floored(fine, 0.1), torch.linalg.cholesky(fine))


def test_schedule_ends_at_its_temperature_and_is_not_cut_short():
    mixture = random_mixture(k=2)
    x, y = random_data(mixture)
    schedule = TemperatureSchedule(4.0, 0.5, share=0.5)
    result = em(mixture, x, y, min_deviation=FLOOR, schedule=schedule, steps=40, tolerance=1e6)
    assert float(result.mixture.log_temperature.exp()) == pytest.approx(0.5)
    # 20 steps to get there, one that shows what a step gains, and the end.
    assert len(result.history) == 22


@pytest.mark.parametrize("activation", ["linear", "tanh"])
def test_after_a_schedule_it_goes_on_until_nothing_is_gained(activation):
    true = random_mixture(activation, k=2)
    x, y = random_data(true, n=200)
    begin = random_mixture(activation, k=2, seed=5)
    schedule = TemperatureSchedule(4.0, 0.05, share=0.01)  # falls at once
    options = {"min_deviation": FLOOR, "steps": 2000}
    result = em(begin, x, y, schedule=schedule, **options)
    assert result.converged
    assert 5 < len(result.history) < 2000
    further = em(result.mixture, x, y, **options)
    assert float(further.log_likelihood - result.log_likelihood) < 1e-4


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_experts_do_not_mind_where_x_lies(offset):
    mixture = random_mixture(k=2)
    x, y = random_data(mixture)
    shares = torch.rand(40, 2, dtype=torch.float64)
    near, far = (expert_step(mixture, some, y, shares, FLOOR) for some in (x, x + offset))
    torch.testing.assert_close(far.coefficients, near.coefficients, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(far.means(x + offset), near.means(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(far.factors, near.factors, atol=1e-6, rtol=1e-6)


def test_a_column_of_x_that_is_constant_has_no_coefficient():
    mixture = random_mixture(k=2)
    x, y = random_data(mixture)
    x[:, 1] = 1234.5678
    found = expert_step(mixture, x, y, torch.rand(40, 2, dtype=torch.float64), FLOOR)
    assert float(found.coefficients[..., 1].abs().max()) < 1e-3
    assert float(found.coefficients[..., 0].abs().min()) > 1e-3


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e12])
def test_directions_without_spread_are_held_at_the_floor_whatever_the_others(scale):
    along = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    covariance = scale**2 * torch.outer(along, along)
    factors = floored(covariance, 1e-3)
    assert torch.equal(factors, factors.tril())
    assert (factors.diagonal() > 0).all()
    least = max(1e-3, 1e-7 * scale * 6**0.5)
    deviations = torch.linalg.svdvals(factors)
    torch.testing.assert_close(deviations[0], torch.tensor(scale * 6**0.5).double())
    torch.testing.assert_close(deviations[1:], torch.full((2,), least).double(), rtol=1e-3, atol=0)
