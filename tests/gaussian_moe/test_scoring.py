import pytest
import torch
from mixtures import random_data, random_mixture

from hf_vqlogits.gaussian_moe.em import em
from hf_vqlogits.gaussian_moe.scoring import retracted, score_ascent, scores
from hf_vqlogits.gaussian_moe.starts import perturbed


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("activation", ["linear", "gelu"])
@pytest.mark.parametrize("learn", [False, True])
def test_scores_are_the_derivatives_of_every_log_density(p, activation, learn):
    mixture = random_mixture(activation, p=p, k=2)
    x, y = random_data(mixture, n=5)
    matrix = scores(mixture, x, y, learn)
    still = torch.zeros(len(matrix), dtype=torch.float64)
    expected = torch.zeros_like(matrix)
    for i in range(len(still)):
        step = still.clone()
        step[i] = 1e-6
        above, below = (
            retracted(mixture, sign * step, 1e-9, learn).log_density(x, y) for sign in (1, -1)
        )
        expected[i] = (above - below) / 2e-6
    torch.testing.assert_close(matrix, expected, rtol=1e-5, atol=1e-6)


def test_ends_where_the_gradient_vanishes_and_em_agrees():
    true = random_mixture("linear", d=1, p=1, k=2, seed=3)
    x, y = random_data(true, n=2000)
    begin = em(
        perturbed(true, 0.1, torch.Generator().manual_seed(0)), x, y, min_deviation=1e-3, steps=10
    )
    result = score_ascent(begin.mixture, x, y, min_deviation=1e-3, tolerance=1e-8)
    assert result.converged
    assert (result.history.diff() >= 0).all()
    total = scores(result.mixture, x, y, False)
    slope = total.sum(-1)
    assert float(slope @ torch.linalg.pinv(total @ total.T, rtol=1e-9) @ slope) < 1e-6
    longer = em(begin.mixture, x, y, min_deviation=1e-3, steps=2000, tolerance=1e-13)
    assert float(result.log_likelihood) == pytest.approx(float(longer.log_likelihood), abs=1e-8)


def test_more_components_than_the_truth_and_many_at_once():
    true = random_mixture("gelu", d=1, p=1, k=2, batch=(3,), seed=5)
    x, y = random_data(true, n=500)
    begin = random_mixture("gelu", d=1, p=1, k=3, batch=(3,), seed=6)
    begin = em(begin, x, y, min_deviation=0.02, learn_temperature=True, steps=20).mixture
    result = score_ascent(begin, x, y, min_deviation=0.02, learn_temperature=True, steps=300)
    assert (result.history.diff(dim=0) >= 0).all()
    assert torch.isfinite(result.history).all()
    assert (result.mixture.factors.diagonal(dim1=-2, dim2=-1) >= 0.02).all()
    assert (result.log_likelihood > true.log_density(x, y).mean(-1)).all()
