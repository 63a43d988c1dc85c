"""The last part of the way to the maximum, where EM becomes slow.

EM gains a fixed share of what is missing in every step, and less and less where components overlap
or are more than needed. Fisher scoring moves all parameters together by (S S^T + damping)^-1 S 1, S
being the P x N matrix of the observations' scores, whose product estimates the Fisher
information. The damping is that of Levenberg and Marquardt, one for each mixture: up after a step
that gained less than it promised, down after one that kept its promise. No step lowers the
likelihood.

Letters: N observations, d width of x, p width of y, k components, P parameters; `...` stands for
leading axes of independent mixtures, each with data of its own.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .em import EMResult, damped_solve, gate_features, moved_gate
from .mixture import TENSORS, Mixture

WINDOW = 6  # steps whose gain together decides whether to go on
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-2, 1e-9, 1e9
KEPT, BROKEN = 0.75, 0.25  # share of the promised gain above and below which the damping changes
LARGEST_LOG_STEP = 1.0  # of temperature and deviations in one step


@torch.no_grad()
def score_ascent(
    mixture: Mixture,
    x: Tensor,
    y: Tensor,
    *,
    min_deviation: float,
    learn_temperature: bool = False,
    steps: int = 200,
    tolerance: float = 1e-4,
) -> EMResult:
    """Climb to the maximum of the likelihood near a mixture.

    Args:
        mixture: where to begin, best after some steps of EM.
        x: (..., N, d).
        y: (..., N, p).
        min_deviation: least standard deviation of a component, given the other columns of y.
        learn_temperature: fit tau as well.
        steps: at most.
        tolerance: stop when no mixture gained more in total than so many nats, all observations
            together, in the last steps. A parameter is then off its maximum by far less than its
            standard error, which half a nat corresponds to.

    Returns:
        [`EMResult`].
    """
    history = [mixture.log_density(x, y).mean(-1)]
    damping = torch.full_like(history[0], FIRST_DAMPING)
    count = x.shape[-2]
    gained = torch.full_like(history[0], torch.inf)
    for _ in range(steps):
        matrix = scores(mixture, x, y, learn_temperature)
        slope, fisher = matrix.sum(-1), matrix @ matrix.mT
        move = _bounded(damped_solve(fisher, slope, damping), mixture, learn_temperature)
        promised = (move * slope).sum(-1) - 0.5 * (move * (fisher @ move[..., None])[..., 0]).sum(
            -1
        )
        moved = retracted(mixture, move, min_deviation, learn_temperature)
        found = moved.log_density(x, y).mean(-1)
        better = found > history[-1]
        kept = (found - history[-1]) * count / promised
        mixture = _chosen(better, moved, mixture)
        history.append(torch.where(better, found, history[-1]))
        damping = torch.where(kept > KEPT, damping / 4, damping)
        damping = torch.where(~(kept > BROKEN), damping * 4, damping)
        damping = damping.clamp(LEAST_DAMPING, MOST_DAMPING)
        if len(history) > WINDOW:
            gained = (history[-1] - history[-1 - WINDOW]) * count
            if bool((gained < tolerance).all()):
                break
    return EMResult(mixture, torch.stack(history), gained < tolerance)


def scores(mixture: Mixture, x: Tensor, y: Tensor, learn_temperature: bool) -> Tensor:
    """Derivatives of every observation's log density.

    Args:
        mixture: at which.
        x: (..., N, d).
        y: (..., N, p).
        learn_temperature: give that by log tau as well.

    Returns:
        (..., P, N): by (beta1_i, beta0_i) for every i, by log tau if learned, by the rows of
        (A_i, b_i), and by D_i in L_i (1 + D_i), D lower triangular.
    """
    whitened = mixture.whitened(x, y)  # (..., N, k, p)
    log_gates = mixture.log_gates(x)
    shares = (log_gates + mixture.log_normal(whitened)).softmax(-1).mT.contiguous()  # (..., k, N)
    features, by_log_tau = gate_features(mixture, x)
    missing = shares - log_gates.mT.exp()
    parts = [(missing[..., None, :] * features).flatten(-3, -2)]
    if learn_temperature:
        parts.append((missing * by_log_tau).sum(-2, keepdim=True))
    turned = whitened.movedim(-3, -1).contiguous()  # (..., k, p, N)
    p = turned.shape[-2]
    pulls = torch.linalg.inv(mixture.factors).mT @ turned
    inputs = torch.nn.functional.pad(x, (0, 1), value=1.0).mT.contiguous()  # (..., d + 1, N)
    by_mean = (shares[..., None, :] * pulls)[..., None, :] * inputs[..., None, None, :, :]
    parts.append(by_mean.flatten(-4, -2))  # (..., k p (d + 1), N)
    rows, columns = torch.tril_indices(p, p)
    on_diagonal = (rows == columns).to(x.dtype)[:, None]
    by_factor = turned[..., rows, :] * turned[..., columns, :] - on_diagonal
    parts.append((shares[..., None, :] * by_factor).flatten(-3, -2))  # (..., k p (p + 1) / 2, N)
    return torch.cat(parts, -2)


def retracted(
    mixture: Mixture, move: Tensor, min_deviation: float, learn_temperature: bool
) -> Mixture:
    """The mixture moved along the parameters of `scores`.

    Args:
        mixture: before.
        move: (..., P).
        min_deviation: the diagonal of L stays at it or above.
        learn_temperature: whether the moves hold one of log tau.
    """
    k, p, d = mixture.coefficients.shape[-3:]
    sizes = [k * (d + 1) + learn_temperature, k * p * (d + 1), k * p * (p + 1) // 2]
    by_gate, by_mean, by_factor = move.split(sizes, -1)
    own = by_mean.unflatten(-1, (k, p, d + 1))
    turn = torch.zeros_like(mixture.factors)
    rows, columns = torch.tril_indices(p, p)
    turn[..., rows, columns] = by_factor.unflatten(-1, (k, -1))
    diagonal = turn.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(diagonal.exp())
    factors = mixture.factors @ turn
    least = factors.diagonal(dim1=-2, dim2=-1)
    least.clamp_(min=min_deviation)
    return replace(
        moved_gate(mixture, by_gate, learn_temperature),
        coefficients=mixture.coefficients + own[..., :-1],
        intercepts=mixture.intercepts + own[..., -1],
        factors=factors,
    )


def _bounded(move: Tensor, mixture: Mixture, learn_temperature: bool) -> Tensor:
    """The move, shortened where temperature or deviations would change by more than e."""
    k, p, d = mixture.coefficients.shape[-3:]
    gate = k * (d + 1)
    logs = [move[..., -(k * p * (p + 1) // 2) :]]
    if learn_temperature:
        logs.append(move[..., gate : gate + 1])
    longest = torch.cat(logs, -1).abs().amax(-1, keepdim=True)
    return move * (LARGEST_LOG_STEP / longest).clamp(max=1.0)


def _chosen(condition: Tensor, one: Mixture, other: Mixture) -> Mixture:
    """`one` where the condition (...) holds, else `other`."""

    def choose(name: str) -> Tensor:
        value: Tensor = getattr(one, name)
        flags = condition.reshape(condition.shape + (1,) * (value.ndim - condition.ndim))
        return torch.where(flags, value, getattr(other, name))

    return replace(one, **{name: choose(name) for name in TENSORS})  # type: ignore[arg-type]
