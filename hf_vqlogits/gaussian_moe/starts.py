"""Where EM begins: k-means clusters of (x, y), or known parameters with some noise.

Letters: N observations, d width of x, p width of y, k components; `...` stands for leading axes of
independent mixtures.
"""

import torch
from torch import Tensor

from .em import expert_step
from .mixture import Mixture

ROUNDS = 20


@torch.no_grad()
def kmeans_start(
    x: Tensor,
    y: Tensor,
    components: int,
    *,
    activation: str,
    temperature: float,
    min_deviation: float,
    generator: torch.Generator | None = None,
) -> Mixture:
    """One expert for each cluster of the standardised (x, y), and a gate that is the same all over.

    Args:
        x: (..., N, d).
        y: (..., N, p).
        components: k.
        activation: of the gate.
        temperature: tau.
        min_deviation: least standard deviation of a component.
        generator: of the first centres.

    Returns:
        The mixtures, in the type of the data.
    """
    rows = torch.cat([x, y], -1)
    spread = rows.std(-2, keepdim=True, correction=0)
    rows = (rows - rows.mean(-2, keepdim=True)) / spread.where(spread > 0, torch.ones_like(spread))
    labels = _kmeans(rows, components, generator)
    shares = torch.nn.functional.one_hot(labels, components).to(x.dtype)  # (..., N, k)
    batch, d, p = x.shape[:-2], x.shape[-1], y.shape[-1]
    tau = x.new_full(batch, temperature)
    # A cluster that is empty begins as the whole sample.
    everything = torch.cov(y.flatten(0, -2).T, correction=0).reshape(p, p).diagonal().sqrt()
    plain = Mixture(
        slopes=x.new_zeros(*batch, components, d),
        biases=(shares.mean(-2) + 1 / x.shape[-2]).log() * temperature,
        log_temperature=tau.log(),
        coefficients=x.new_zeros(*batch, components, p, d),
        intercepts=y.mean(-2)[..., None, :].expand(*batch, components, p),
        factors=torch.diag_embed(everything.clamp(min=min_deviation)).expand(
            *batch, components, p, p
        ),
        activation=activation,
    )
    return expert_step(plain, x, y, shares, min_deviation)


def _kmeans(rows: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Cluster of every row (..., N), by Lloyd's rounds from centres drawn as k-means++ does."""
    flat = rows.reshape(-1, *rows.shape[-2:])
    distances = flat.new_ones(flat.shape[:-1])
    centres = []
    for _ in range(count):
        # The least weight lets equal rows be drawn, where there are fewer different ones than k.
        drawn = torch.multinomial(
            distances.clamp(min=torch.finfo(rows.dtype).tiny), 1, generator=generator
        )
        centres.append(flat.take_along_dim(drawn[..., None], -2))
        distances = torch.cdist(flat, torch.cat(centres, -2)).square().amin(-1)
    centre = torch.cat(centres, -2)  # (B, k, width)
    for _ in range(ROUNDS):
        labels = torch.cdist(flat, centre).argmin(-1)
        members = torch.nn.functional.one_hot(labels, count).to(rows.dtype).mT  # (B, k, N)
        sizes = members.sum(-1, keepdim=True)
        centre = torch.where(sizes > 0, members @ flat / sizes.clamp(min=1), centre)
    return labels.reshape(rows.shape[:-1])


def perturbed(mixture: Mixture, scale: float, generator: torch.Generator | None = None) -> Mixture:
    """A mixture with independent normal noise on every parameter; factors and tau on their logs.

    Args:
        mixture: around which.
        scale: standard deviation of the noise.
        generator: of the noise.
    """

    def noise(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        return scale * drawn

    factors = mixture.factors
    diagonal = noise(factors.diagonal(dim1=-2, dim2=-1)).exp()
    return Mixture(
        mixture.slopes + noise(mixture.slopes),
        mixture.biases + noise(mixture.biases),
        mixture.log_temperature + noise(mixture.log_temperature),
        mixture.coefficients + noise(mixture.coefficients),
        mixture.intercepts + noise(mixture.intercepts),
        factors * diagonal[..., None, :] + noise(factors).tril(-1),
        mixture.activation,
    )
