import math

import pytest
import torch
from mixtures import random_data, random_mixture
from torch.distributions import MultivariateNormal

from hf_vqlogits.gaussian_moe.mixture import TENSORS, Mixture


def reference(mixture, x, y):
    """log p(y | x) by way of the density itself, an observation at a time."""
    gates = mixture.log_gates(x).exp()
    found = []
    for one, target, weights in zip(x, y, gates, strict=True):
        total = 0.0
        for i, weight in enumerate(weights):
            mean = mixture.coefficients[i] @ one + mixture.intercepts[i]
            normal = MultivariateNormal(mean, mixture.factors[i] @ mixture.factors[i].T)
            total += float(weight) * math.exp(float(normal.log_prob(target)))
        found.append(math.log(total))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("d", "p"), [(1, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_log_density_is_that_of_the_formula(d, p, activation):
    mixture = random_mixture(activation, d=d, p=p)
    x, y = random_data(mixture)
    torch.testing.assert_close(mixture.log_density(x, y), reference(mixture, x, y))


def test_leading_axes_are_independent_mixtures():
    many = random_mixture("sigmoid", batch=(2, 3))
    x, y = random_data(many)
    found = many.log_density(x, y)
    for i in range(2):
        for j in range(3):
            one = many.map(lambda tensor, i=i, j=j: tensor[i, j])
            torch.testing.assert_close(found[i, j], one.log_density(x[i, j], y[i, j]))


@pytest.mark.parametrize("p", [1, 2])
def test_gradients(p):
    mixture = random_mixture("tanh", p=p)
    x, y = random_data(mixture, n=4)
    tensors = [getattr(mixture, name).requires_grad_() for name in TENSORS]
    torch.autograd.gradcheck(lambda *given: Mixture(*given, "tanh").log_density(x, y), tensors)


def test_far_from_every_component_the_density_has_a_logarithm():
    mixture = random_mixture(p=1)
    x = torch.zeros(1, 2, dtype=torch.float64)
    found = mixture.log_density(x, torch.full((1, 1), 1e4, dtype=torch.float64))
    assert torch.isfinite(found).all()
    assert found < -1e6


def test_density_integrates_to_one():
    mixture = random_mixture("silu", p=1)
    x = torch.randn(1, 2, dtype=torch.float64)
    y = torch.linspace(-40, 40, 8001, dtype=torch.float64)[:, None]
    density = mixture.log_density(x.expand(8001, 2), y).exp()
    assert float(density.sum() * 0.01) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_samples_have_the_mixture_s_moments(p):
    mixture = random_mixture("gelu", p=p)
    x = torch.randn(1, 2, dtype=torch.float64)
    draws = mixture.sample(x.expand(200_000, 2), torch.Generator().manual_seed(0))
    gates, means = mixture.log_gates(x).exp()[0], mixture.means(x)[0]
    mean = (gates[:, None] * means).sum(0)
    torch.testing.assert_close(mixture.mean(x)[0], mean)
    outer = means[:, :, None] * means[:, None, :]
    second = (gates[:, None, None] * (mixture.covariances + outer)).sum(0)
    torch.testing.assert_close(draws.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(draws.T @ draws / len(draws), second, atol=0.1, rtol=0.02)


def test_anchoring_changes_no_density():
    for activation in ("linear", "gelu"):
        mixture = random_mixture(activation)
        x, y = random_data(mixture)
        anchored = mixture.anchored()
        torch.testing.assert_close(anchored.log_density(x, y), mixture.log_density(x, y))
        assert anchored.biases[-1] == 0
        assert (anchored.slopes[-1] == 0).all() == (activation == "linear")
        torch.testing.assert_close(anchored.weights, mixture.weights)


def test_plain_gate_at_unit_temperature_is_the_same():
    mixture = random_mixture()
    x, y = random_data(mixture)
    scaled = mixture.at_unit_temperature()
    assert scaled.log_temperature == 0
    torch.testing.assert_close(scaled.log_density(x, y), mixture.log_density(x, y))
    with pytest.raises(ValueError, match="Only the plain gate .* got `activation` 'gelu'"):
        random_mixture("gelu").at_unit_temperature()
