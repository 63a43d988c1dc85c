"""Random mixtures and data for the tests."""

import torch

from hf_vqlogits.gaussian_moe.mixture import Mixture


def random_mixture(activation="linear", *, k=3, d=2, p=2, batch=(), seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn((*batch, *shape), generator=draw, dtype=torch.float64)

    factors = 0.3 * normal(k, p, p).tril(-1) + torch.diag_embed((0.3 * normal(k, p)).exp())
    return Mixture(
        normal(k, d), normal(k), 0.3 * normal(), normal(k, p, d), normal(k, p), factors, activation
    )


def random_data(mixture, n=40, seed=1):
    draw = torch.Generator().manual_seed(seed)
    batch, d = mixture.slopes.shape[:-2], mixture.slopes.shape[-1]
    x = torch.randn(*batch, n, d, generator=draw, dtype=torch.float64)
    return x, mixture.sample(x, draw)
