"""EM for a model: starts, restarts, and the report."""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import check_data, columns
from .em import EMResult, em
from .mixture import Mixture
from .modeling_gaussian_moe import GaussianMoEModel, collapsed_components
from .standardising import Standardisation
from .starts import kmeans_start
from .temperature import TemperatureSchedule

logger = logging.getLogger(__name__)

STARTS = ("kmeans", "model")
ROUNDED = 0.01  # nats an observation that the model's number format may cost without a warning


@dataclass(frozen=True)
class FitReport:
    """What a fit did.

    Attributes:
        log_likelihood: mean of log p(y | x) in nats, of the fitted model.
        history: the same before every step of the best start.
        converged: whether the last step gained less than the tolerance.
        collapsed: components whose deviation is at the floor `min_deviation`.
    """

    log_likelihood: float
    history: list[float]
    converged: bool
    collapsed: list[int]


def fit_em(
    model: GaussianMoEModel,
    x: Tensor,
    y: Tensor,
    *,
    start: str = "kmeans",
    restarts: int = 10,
    schedule: TemperatureSchedule | None = None,
    steps: int = 500,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> FitReport:
    """Fit a model by EM, in float64 and to standardised data, and leave the parameters in it.

    A component whose variance shrinks to zero is held at `config.min_deviation` and named in the
    report and the log; one that loses all observations keeps its expert, and its gate closes.

    Args:
        model: changed in place; its temperature is learned if its configuration says so.
        x: (N, d), or (N,) for d = 1.
        y: (N, p), or (N,) for p = 1.
        start: `"kmeans"`, or `"model"` for the parameters that the model has.
        restarts: k-means starts, fitted together, of which the likeliest is taken.
        schedule: of the temperature over the steps, instead of a fixed one.
        steps: of EM, at most.
        tolerance: stop when a step gained fewer nats an observation.
        seed: of the k-means starts.

    Returns:
        [`FitReport`].

    Raises:
        ValueError: data of a wrong shape, not finite, or fewer than components; an unknown start; a
            schedule for a model that learns its temperature; a number below 1; or no start gave
            parameters that are numbers of the model's format. The model is as it was then.
    """
    config = model.config
    x = _observations(model, x, config.input_size, "x")
    y = _observations(model, y, config.output_size, "y")
    check_data(x, y, config.num_components)
    if start not in STARTS:
        raise ValueError(f"`start` must be one of {STARTS}, got {start!r}.")
    for name, value in (("restarts", restarts), ("steps", steps)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if schedule is not None and config.learn_temperature:
        raise ValueError(
            "`schedule` sets the temperature that `learn_temperature=True` would fit; choose one "
            "of them."
        )
    standard = Standardisation.of(x, y, config.activation)
    min_deviation = config.min_deviation / float(standard.y_scale)
    inputs, targets = standard.inputs(x), standard.targets(y)
    if start == "model":
        own = model.mixture().map(lambda tensor: tensor.detach().double())
        first = standard.inward(own).map(lambda tensor: tensor[None])
    else:
        first = kmeans_start(
            inputs.expand(restarts, *inputs.shape),
            targets.expand(restarts, *targets.shape),
            config.num_components,
            activation=config.activation,
            temperature=model.temperature,
            min_deviation=min_deviation,
            generator=torch.Generator(x.device).manual_seed(seed),
        )
    count = len(first.log_temperature)
    result = em(
        first,
        inputs.expand(count, *inputs.shape),
        targets.expand(count, *targets.shape),
        min_deviation=min_deviation,
        learn_temperature=config.learn_temperature,
        schedule=schedule,
        steps=steps,
        tolerance=tolerance,
    )
    best = _likeliest(result)
    found = standard.outward(result.mixture.map(lambda tensor: tensor[best]))
    log_likelihood = float(result.log_likelihood[best]) + standard.log_density_shift
    _check_rounding(model, found, x, y, log_likelihood)
    collapsed = collapsed_components(found.factors, config.min_deviation)
    if collapsed:
        logger.warning(
            "Components %s collapsed onto a few observations and are held at the deviation %g; fit "
            "fewer components, or raise `min_deviation`.",
            collapsed,
            config.min_deviation,
        )
    model.set_mixture(found)
    return FitReport(
        log_likelihood,
        (result.history[:, best] + standard.log_density_shift).tolist(),
        bool(result.converged[best]),
        collapsed,
    )


def _observations(model: GaussianMoEModel, values: Tensor, width: int, name: str) -> Tensor:
    """Rows (N, width) in float64, where the model is."""
    rows = columns(values, width, name)
    if rows.ndim != 2:
        raise ValueError(f"`{name}` must have the shape (N, {width}), got {tuple(rows.shape)}.")
    return rows.to(model.device, torch.float64)


def _likeliest(result: EMResult) -> int:
    """Which of the fitted mixtures, of those that ended in numbers."""
    ended = result.log_likelihood
    if not bool(ended.isfinite().any()):
        raise ValueError(
            "No start of the fit ended in numbers: x or y are too large or too uneven. Divide "
            "their columns by their spread, and leave out those that say nothing."
        )
    return int(ended.where(ended.isfinite(), -torch.inf).argmax())


@torch.no_grad()
def _check_rounding(
    model: GaussianMoEModel, found: Mixture, x: Tensor, y: Tensor, log_likelihood: float
) -> None:
    """Warn where the parameters, in the model's number format, mean something else."""
    dtype, computed = model.dtype, torch.promote_types(model.dtype, torch.float32)
    rounded = found.map(lambda tensor: tensor.to(dtype).to(computed))
    kept = float(rounded.log_density(x.to(computed), y.to(computed)).double().mean())
    if not math.isfinite(kept):
        raise ValueError(
            f"The fitted parameters are no numbers of the model's type, {dtype}: x or y are too "
            "large. Divide their columns by their spread, or fit `model.double()`."
        )
    if log_likelihood - kept > ROUNDED:
        logger.warning(
            "The fit has %g nats an observation, but %g in the model's type, %s: x lies far from "
            "zero beside its spread. Subtract a constant, or fit `model.double()`.",
            log_likelihood,
            kept,
            dtype,
        )
