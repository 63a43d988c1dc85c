"""Expectation-maximisation for many mixtures at once, with a gradient M-step for the gate.

One step computes responsibilities r_ni = p(component i | x_n, y_n), then

- experts: weighted least squares for A_i, b_i, and the weighted covariance of the residuals, whose
  eigenvalues are kept at `min_deviation`^2 or above (that is the constrained maximum);
- gate: one step uphill on sum_ni r_ni log gate_i(x_n), the gradient taken in the metric of the
  gate's Fisher information, and halved until the objective does not fall.

So no step lowers the likelihood (generalised EM), for as long as no schedule moves the temperature.

Letters: N observations, d width of x, p width of y, k components; `...` stands for leading axes of
independent mixtures, each with data of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..gates import activation_slope
from .mixture import Mixture

HALVINGS = 8
RIDGE = 1e-10  # of the diagonal, for components on fewer points than coefficients
ROUNDING = 1e-12  # of a centre; a spread below it is none
LEAST_RATIO = 1e-7  # of a component's deviations: below it a covariance in float64 is rounding
DAMPING = 1e-9  # of the Fisher information's scale: directions that change no gate stay put
LARGEST_LOG_STEP = 0.5  # of the temperature in one step
LEAST_MASS = 1e-6  # observations; a component that has lost all keeps its expert


@dataclass(frozen=True)
class EMResult:
    """What EM found.

    Attributes:
        mixture: the last parameters.
        history: mean log-likelihood an observation before every step (steps, ...), and at the end.
        converged: (...), whether the last gain was below the tolerance.
    """

    mixture: Mixture
    history: Tensor
    converged: Tensor

    @property
    def log_likelihood(self) -> Tensor:
        """Mean log-likelihood an observation at the end (...)."""
        return self.history[-1]


@torch.no_grad()
def em(
    mixture: Mixture,
    x: Tensor,
    y: Tensor,
    *,
    min_deviation: float,
    learn_temperature: bool = False,
    schedule: Callable[[float], float] | None = None,
    steps: int = 500,
    tolerance: float = 1e-8,
) -> EMResult:
    """Fit mixtures by EM.

    Args:
        mixture: where to begin.
        x: (..., N, d).
        y: (..., N, p).
        min_deviation: least standard deviation of a component.
        learn_temperature: fit tau with the gate.
        schedule: tau by the share of `steps` done, instead.
        steps: at most.
        tolerance: stop when no mixture gained more nats an observation in a step; with a schedule
            only in a step at its last temperature.

    Returns:
        [`EMResult`].
    """
    history: list[Tensor] = []
    temperatures: list[float | None] = []
    for step in range(steps):
        tau = None if schedule is None else schedule((step + 1) / steps)
        temperatures.append(tau)
        if tau is not None:
            log_temperature = torch.full_like(mixture.log_temperature, tau).log()
            mixture = replace(mixture, log_temperature=log_temperature)
        joint = mixture.log_joint(x, y)
        log_density = joint.logsumexp(-1)
        history.append(log_density.mean(-1))
        # A likelihood at another temperature says nothing of what a step gains.
        settled = schedule is None or temperatures[-2:] == [schedule(1.0)] * 2
        if settled and step > 0 and bool((history[-1] - history[-2] < tolerance).all()):
            break
        shares = (joint - log_density[..., None]).exp()
        mixture = expert_step(mixture, x, y, shares, min_deviation)
        mixture = gate_step(mixture, x, shares, learn_temperature)
    history.append(mixture.log_density(x, y).mean(-1))
    gained = history[-1] - history[-2]
    return EMResult(mixture, torch.stack(history), gained < tolerance)


def expert_step(
    mixture: Mixture, x: Tensor, y: Tensor, shares: Tensor, min_deviation: float
) -> Mixture:
    """The experts that fit best given the responsibilities.

    Args:
        mixture: for the experts of components without data.
        x: (..., N, d).
        y: (..., N, p).
        shares: responsibilities (..., N, k).
        min_deviation: least standard deviation.
    """
    weights = shares.mT[..., None]  # (..., k, N, 1)
    mass = weights.sum(-2, keepdim=True)  # (..., k, 1, 1)
    divisor = mass.clamp(min=LEAST_MASS)
    # Around the component's own centre, beside which its spread may be small.
    x_centre = (shares.mT @ x)[..., None, :] / divisor  # (..., k, 1, d)
    y_centre = (shares.mT @ y)[..., None, :] / divisor
    inputs, targets = x[..., None, :, :] - x_centre, y[..., None, :, :] - y_centre
    weighted = weights * inputs
    gram = weighted.mT @ inputs  # (..., k, d, d)
    rounding = mass[..., 0] * (ROUNDING * x_centre[..., 0, :]).square()
    lift = RIDGE * gram.diagonal(dim1=-2, dim2=-1) + rounding + torch.finfo(x.dtype).tiny
    solution = torch.linalg.solve(gram + torch.diag_embed(lift), weighted.mT @ targets)
    residuals = targets - inputs @ solution  # (..., k, N, p)
    covariance = (weights * residuals).mT @ residuals / divisor
    alive = mass > LEAST_MASS
    intercepts = (y_centre - x_centre @ solution)[..., 0, :]
    return replace(
        mixture,
        coefficients=solution.mT.where(alive, mixture.coefficients),
        intercepts=intercepts.where(alive[..., 0], mixture.intercepts),
        factors=floored(covariance, min_deviation).where(alive, mixture.factors),
    )


def floored(covariance: Tensor, min_deviation: float) -> Tensor:
    """Cholesky factors of covariances whose eigenvalues are raised to a floor.

    Args:
        covariance: (..., p, p).
        min_deviation: root of the floor; for each covariance at least `LEAST_RATIO` of the root of
            its largest eigenvalue.

    Returns:
        L (..., p, p).
    """
    if covariance.shape[-1] == 1:
        return covariance.sqrt().clamp(min=min_deviation)
    values, vectors = torch.linalg.eigh(covariance)
    deviations = values.clamp(min=0).sqrt()
    floor = (LEAST_RATIO * deviations[..., -1:]).clamp(min=min_deviation)
    # L^T is what QR leaves of any other root, and loses nothing of small eigenvalues beside large.
    root = deviations.maximum(floor)[..., None] * vectors.mT
    factors = torch.linalg.qr(root).R.mT
    signs = factors.diagonal(dim1=-2, dim2=-1).sign()
    return factors * signs[..., None, :]


def gate_features(mixture: Mixture, x: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the gate's scores.

    Args:
        mixture: its gate.
        x: (..., N, d).

    Returns:
        Of score i by (beta1_i, beta0_i), (..., k, d + 1, N), and of all scores by log tau, up to a
        common shift, (..., k, N). Observations come last: sums over short last axes are slow.
    """
    tau = mixture.log_temperature.exp()[..., None, None]
    turned = x.mT  # (..., d, N)
    slope = activation_slope(mixture.slopes @ turned, mixture.activation) / tau  # (..., k, N)
    by_slopes = slope[..., None, :] * turned[..., None, :, :]
    by_bias = (1 / tau).expand_as(slope)[..., None, :]
    return torch.cat([by_slopes, by_bias], -2), -mixture.log_gates(x).mT.contiguous()


def moved_gate(mixture: Mixture, move: Tensor, learn_temperature: bool) -> Mixture:
    """The mixture with its gate's parameters moved.

    Args:
        mixture: before.
        move: of (beta1_i, beta0_i) for every i, then of log tau if it is learned: (..., P).
        learn_temperature: whether it is.
    """
    k, d = mixture.slopes.shape[-2:]
    own = move[..., : k * (d + 1)].unflatten(-1, (k, d + 1))
    moved = replace(
        mixture, slopes=mixture.slopes + own[..., :-1], biases=mixture.biases + own[..., -1]
    )
    if learn_temperature:
        moved = replace(moved, log_temperature=mixture.log_temperature + move[..., -1])
    return moved


def gate_step(mixture: Mixture, x: Tensor, shares: Tensor, learn_temperature: bool) -> Mixture:
    """One step uphill on sum_ni r_ni log gate_i(x_n), in the metric of the Fisher information.

    Args:
        mixture: its gate.
        x: (..., N, d).
        shares: responsibilities r (..., N, k).
        learn_temperature: move tau as well.

    Returns:
        The mixture with a gate that is no worse.
    """
    log_gates = mixture.log_gates(x)
    gates = log_gates.mT.exp().contiguous()  # (..., k, N)
    features, by_log_tau = gate_features(mixture, x)
    missing = shares.mT - gates
    slope = (features @ missing[..., None])[..., 0].flatten(-2)  # (..., k (d + 1))
    weighted = gates[..., None, :] * features
    flat = weighted.flatten(-3, -2)  # (..., k (d + 1), N)
    fisher = -flat @ flat.mT
    own = weighted @ features.mT  # (..., k, d + 1, d + 1)
    k, width = own.shape[-3], own.shape[-1]
    blocks = fisher.unflatten(-1, (k, width)).unflatten(-3, (k, width))
    blocks.diagonal(dim1=-4, dim2=-2).add_(own.movedim(-3, -1))
    if learn_temperature:
        centred = by_log_tau - (gates * by_log_tau).sum(-2, keepdim=True)
        cross = (weighted @ centred[..., None]).flatten(-3, -2)
        corner = (gates * centred.square()).sum((-2, -1))[..., None, None]
        fisher = torch.cat([torch.cat([fisher, cross], -1), torch.cat([cross.mT, corner], -1)], -2)
        slope = torch.cat([slope, (missing * by_log_tau).sum((-2, -1))[..., None]], -1)
    move = damped_solve(fisher, slope, DAMPING)
    if learn_temperature:
        move = move * (LARGEST_LOG_STEP / move[..., -1:].abs()).clamp(max=1.0)
    return _halved(mixture, move, x, shares, log_gates, learn_temperature)


def damped_solve(matrix: Tensor, vector: Tensor, damping: float | Tensor) -> Tensor:
    """Solve (M + damping D) z = v, D the diagonal of M and, below, a trace of its mean.

    Args:
        matrix: positive semi-definite (..., P, P).
        vector: (..., P).
        damping: relative to the diagonal; a number, or (...).

    Returns:
        (..., P).
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    factor = torch.as_tensor(damping, dtype=matrix.dtype, device=matrix.device)[..., None]
    least = DAMPING * mean + torch.finfo(matrix.dtype).tiny
    lift = factor * diagonal + least
    solved: Tensor = torch.linalg.solve(matrix + torch.diag_embed(lift), vector)
    return solved


def _halved(
    mixture: Mixture,
    move: Tensor,
    x: Tensor,
    shares: Tensor,
    log_gates: Tensor,
    learn_temperature: bool,
) -> Mixture:
    """The move, halved for each mixture until its objective is no worse, or no move."""
    before = (shares * log_gates).sum((-2, -1))
    factor = torch.ones_like(before)
    for _ in range(HALVINGS):
        moved = moved_gate(mixture, factor[..., None] * move, learn_temperature)
        worse = ~((shares * moved.log_gates(x)).sum((-2, -1)) >= before)
        if not worse.any():
            return moved
        factor = torch.where(worse, factor / 2, factor)
    factor = torch.where(worse, 0.0, factor)
    return moved_gate(mixture, factor[..., None] * move, learn_temperature)
