import pytest
import torch
from mixtures import random_data, random_mixture

from hf_vqlogits.gates import ACTIVATIONS
from hf_vqlogits.gaussian_moe.mixture import TENSORS
from hf_vqlogits.gaussian_moe.standardising import Standardisation


def data(mixture):
    x, y = random_data(mixture, n=200)
    return x * torch.tensor([3.0, 1e-4]) + torch.tensor([1e3, -2.0]), 50 * y + 7


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_mixture_goes_in_and_out_and_its_density_with_it(activation):
    mixture = random_mixture(activation)
    x, y = data(mixture)
    standard = Standardisation.of(x, y, activation)
    inside = standard.inward(mixture)
    shifted = inside.log_density(standard.inputs(x), standard.targets(y))
    torch.testing.assert_close(shifted + standard.log_density_shift, mixture.log_density(x, y))
    outside = standard.outward(inside)
    for name in TENSORS:
        torch.testing.assert_close(getattr(outside, name), getattr(mixture, name))


def test_data_are_around_zero_and_of_size_one():
    x, y = data(random_mixture())
    standard = Standardisation.of(x, y, "linear")
    inputs, targets = standard.inputs(x), standard.targets(y)
    torch.testing.assert_close(inputs.mean(0), torch.zeros(2).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(inputs.square().mean(0), torch.ones(2).double())
    torch.testing.assert_close(targets.mean(0), torch.zeros(2).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(targets.square().mean(), torch.tensor(1.0).double())
    # Without a bias inside of the activation x = 0 is no matter of taste.
    standard = Standardisation.of(x, y, "gelu")
    assert (standard.x_centre == 0).all()
    torch.testing.assert_close(standard.inputs(x).square().mean(0), torch.ones(2).double())


@pytest.mark.parametrize("size", [1e-200, 1e300])
def test_squares_and_sums_out_of_range_are_avoided(size):
    x = size * torch.tensor([[1.0], [1.5], [0.5]]).double()
    standard = Standardisation.of(x, x, "linear")
    torch.testing.assert_close(standard.inputs(x), standard.targets(x))
    torch.testing.assert_close(standard.targets(x).square().mean(), torch.tensor(1.0).double())


def test_constant_columns_stay_and_count_as_zero():
    x = torch.full((5, 2), 3.0).double()
    standard = Standardisation.of(x, x[:, :1], "linear")
    assert (standard.inputs(x) == 0).all()
    assert (standard.targets(x[:, :1]) == 0).all()
    assert standard.log_density_shift == 0
