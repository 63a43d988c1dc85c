"""How far fitted parameters are from the true ones, cell by cell.

Every fitted component belongs to the cell of the nearest true one, by the Euclidean distance over
beta1, A, b and nu. A cell with one fitted component is exactly covered, one with more is
over-covered. The Voronoi loss is

    sum_j |sum_{i in cell j} w_i - w*_j|  +  sum_j sum_{i in cell j} w_i (|d beta1|^e1 + |d tau|^e2
        + |d A|^e3 + |d b|^e4 + |d nu|^e5)

with w_i = exp(beta0_i / tau), divided by their sum, and d the difference from the true component j.
All exponents of an exactly covered cell are 1. In an over-covered cell they are so large that the
loss falls like the distance of the densities, n^(-1/2). They follow from which derivatives of a
component's density are linearly dependent:

- the second derivative by b is twice the first by nu, so the errors of b cancel up to the order r,
  the least for which a system of polynomial equations has no solution but zero: r(2) = 4, r(3) = 6,
  and 7 or more beyond. Hence e4 = r and e5 = r / 2: rates n^(-1/(2r)) and n^(-1/r);
- with an activation that is all, so e1 = e2 = e3 = 2: rates n^(-1/4);
- in the plain gate the derivative by beta1 and b is also that by A, up to a factor tau, so that
  e1 = e4 = r and e3 = e5 = r / 2. There the derivative by tau is already at first order a
  combination of those by beta1 and beta0, and no exponent makes up for that: e2 = 2 is a
  convention.

**What the gate leaves open.** A common shift of beta0 drops out of w. A common shift of beta1,
which the plain gate does not see, is taken out: cells are found with slopes around their weighted
mean, and from the differences their weighted mean is subtracted.

Sources: Nguyen, Akbarian and Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of
Experts?"; for r, Ho and Nguyen, "Convergence rates of parameter estimation for some weakly
identifiable finite mixtures".

Letters: d width of x, p width of y, k fitted and m true components; `...` stands for leading axes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..gates import LINEAR
from .mixture import Mixture

PARAMETERS = ("slopes", "temperature", "coefficients", "intercepts", "covariances")
UNSOLVABLE = {1: 1, 2: 4, 3: 6}
UNSOLVABLE_BEYOND = 7


@dataclass(frozen=True)
class VoronoiErrors:
    """Of mixtures against the true one.

    Attributes:
        loss: the Voronoi loss (...).
        sizes: fitted components in every cell (..., m).
        errors: for each of `PARAMETERS`, the root of the weighted mean square error of the cell's
            components (..., m); NaN in a cell without any.
    """

    loss: Tensor
    sizes: Tensor
    errors: dict[str, Tensor]


def exponents(size: int, activation: str) -> dict[str, float]:
    """Exponents of the parameters' errors in a cell, see above.

    Args:
        size: fitted components in it; at least 1.
        activation: of the gate.

    Raises:
        ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}: an empty cell has no errors.")
    if size == 1:
        return dict.fromkeys(PARAMETERS, 1.0)
    order = float(UNSOLVABLE.get(size, UNSOLVABLE_BEYOND))
    plain = activation == LINEAR
    values = (order if plain else 2.0, 2.0, order / 2 if plain else 2.0, order, order / 2)
    return dict(zip(PARAMETERS, values, strict=True))


@torch.no_grad()
def voronoi(fitted: Mixture, true: Mixture) -> VoronoiErrors:
    """Voronoi loss and the errors in every cell.

    Args:
        fitted: mixtures of k components (...).
        true: of m components, without leading axes.

    Returns:
        [`VoronoiErrors`].

    Raises:
        ValueError: the activations differ.
    """
    if fitted.activation != true.activation:
        raise ValueError(
            f"A gate with `activation` {fitted.activation!r} has no parameters in common with one "
            f"with {true.activation!r}."
        )
    ours, theirs = _parameters(fitted), _parameters(true)
    shares = fitted.weights  # (..., k)
    cell = _nearest(_centred(ours, fitted), _centred(theirs, true))  # (..., k)
    differences = {name: ours[name] - theirs[name][cell] for name in PARAMETERS}
    if fitted.activation == LINEAR:
        shift = (shares[..., None] * differences["slopes"]).sum(-2, keepdim=True)
        differences["slopes"] = differences["slopes"] - shift
    lengths = {name: d.norm(dim=-1) for name, d in differences.items()}  # (..., k)
    members = one_hot(cell, len(theirs["slopes"])).to(shares.dtype)  # (..., k, m)
    sizes = members.sum(-2)
    own_size = sizes.gather(-1, cell).long()
    powers = _power_table(fitted.slopes.shape[-2], fitted.activation)
    loss = ((shares[..., None] * members).sum(-2) - true.weights).abs().sum(-1)
    for name, length in lengths.items():
        power = torch.tensor(powers[name], dtype=shares.dtype, device=shares.device)[own_size]
        loss = loss + (shares * length.pow(power)).sum(-1)
    mass = (shares[..., None] * members).sum(-2)
    errors = {
        name: ((shares * length.square())[..., None] * members).sum(-2).div(mass).sqrt()
        for name, length in lengths.items()
    }
    return VoronoiErrors(loss, sizes.long(), errors)


def _parameters(mixture: Mixture) -> dict[str, Tensor]:
    """Each parameter as a vector a component (..., k, width)."""
    tau = mixture.log_temperature.exp()[..., None, None].expand(*mixture.biases.shape, 1)
    tensors = (
        mixture.slopes,
        tau,
        mixture.coefficients.flatten(-2),
        mixture.intercepts,
        mixture.covariances.flatten(-2),
    )
    return dict(zip(PARAMETERS, tensors, strict=True))


def _centred(parameters: dict[str, Tensor], mixture: Mixture) -> dict[str, Tensor]:
    """The parameters with the slopes of a plain gate around their weighted mean."""
    if mixture.activation != LINEAR:
        return parameters
    slopes = parameters["slopes"]
    mean = (mixture.weights[..., None] * slopes).sum(-2, keepdim=True)
    return {**parameters, "slopes": slopes - mean}


def _nearest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    """Index of the nearest true component (..., k); the temperature is common to all."""
    names = [name for name in PARAMETERS if name != "temperature"]
    one, other = (torch.cat([side[name] for name in names], -1) for side in (ours, theirs))
    return torch.cdist(one, other.expand(*one.shape[:-2], *other.shape[-2:])).argmin(-1)


def _power_table(most: int, activation: str) -> dict[str, list[float]]:
    """For each parameter the exponent by size, from 0 (which no component has) up."""
    tables = [exponents(max(size, 1), activation) for size in range(most + 1)]
    return {name: [table[name] for table in tables] for name in PARAMETERS}
