import torch
from mixtures import random_mixture

from hf_vqlogits.gaussian_moe.mixture import TENSORS
from hf_vqlogits.gaussian_moe.starts import kmeans_start, perturbed


def lines(n=300):
    """Two lines far apart, half of the points each."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, generator=draw, dtype=torch.float64)
    second = torch.arange(n)[:, None] % 2
    noise = 0.1 * torch.randn(n, 1, generator=draw, dtype=torch.float64)
    return x, torch.where(second == 1, 10 + 2 * x, -x) + noise


def start(x, y, k, seed=0):
    return kmeans_start(
        x,
        y,
        k,
        activation="linear",
        temperature=0.5,
        min_deviation=1e-3,
        generator=torch.Generator().manual_seed(seed),
    )


def test_clusters_that_are_apart_are_found():
    x, y = lines()
    found = start(x.expand(4, -1, -1), y.expand(4, -1, -1), 2)
    # One start in four may end with the clusters across the lines.
    best = int(found.log_density(x, y).mean(-1).argmax())
    order = found.intercepts[best, :, 0].argsort()
    slopes = found.coefficients[best, order, 0, 0]
    torch.testing.assert_close(slopes, torch.tensor([-1.0, 2.0]).double(), atol=0.1, rtol=0)
    half = torch.full((2,), 0.5).double()
    torch.testing.assert_close(found.weights[best], half, atol=1e-9, rtol=0)
    assert (found.slopes == 0).all()
    torch.testing.assert_close(found.log_temperature.exp(), torch.full((4,), 0.5).double())


def test_equal_rows_give_a_finite_start():
    x, y = torch.ones(6, 1).double(), torch.full((6, 2), 3.0).double()
    found = start(x, y, 3)
    for name in TENSORS:
        assert torch.isfinite(getattr(found, name)).all()
    assert torch.isfinite(found.log_density(x, y)).all()


def test_the_same_seed_gives_the_same_start():
    x, y = lines()
    assert torch.equal(start(x, y, 4, seed=1).intercepts, start(x, y, 4, seed=1).intercepts)


def test_noise_has_its_scale_and_leaves_factors_triangular():
    mixture = random_mixture(k=400, p=2)
    noisy = perturbed(mixture, 0.1, torch.Generator().manual_seed(0))
    for name in ("slopes", "biases", "coefficients", "intercepts"):
        difference = getattr(noisy, name) - getattr(mixture, name)
        assert 0.08 < float(difference.std()) < 0.12
    ratios = (noisy.factors / mixture.factors).diagonal(dim1=-2, dim2=-1).log()
    assert 0.08 < float(ratios.std()) < 0.12
    assert (noisy.factors.triu(1) == 0).all()
    assert noisy.log_temperature != mixture.log_temperature
