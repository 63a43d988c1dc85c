"""EM for a model: starts, restarts, and the report."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import check_data, columns
from .em import em
from .mixture import Mixture
from .modeling_gaussian_moe import GaussianMoEModel, collapsed_components
from .starts import kmeans_start
from .temperature import TemperatureSchedule

logger = logging.getLogger(__name__)

STARTS = ("kmeans", "model")


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
    """Fit a model by EM, in float64, and leave the parameters in it.

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
            schedule for a model that learns its temperature; or a number below 1.
    """
    config = model.config
    x = columns(x, config.input_size, "x").double()
    y = columns(y, config.output_size, "y").double()
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
    first = _first(model, x, y, start, restarts, seed)
    count = len(first.log_temperature)
    result = em(
        first,
        x.expand(count, *x.shape),
        y.expand(count, *y.shape),
        min_deviation=config.min_deviation,
        learn_temperature=config.learn_temperature,
        schedule=schedule,
        steps=steps,
        tolerance=tolerance,
    )
    best = int(result.log_likelihood.argmax())
    found = result.mixture.map(lambda tensor: tensor[best])
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
        float(result.log_likelihood[best]),
        result.history[:, best].tolist(),
        bool(result.converged[best]),
        collapsed,
    )


def _first(
    model: GaussianMoEModel, x: Tensor, y: Tensor, start: str, restarts: int, seed: int
) -> Mixture:
    """Mixtures to begin with, on a leading axis."""
    if start == "model":
        return model.mixture().map(lambda tensor: tensor.detach().double()[None])
    return kmeans_start(
        x.expand(restarts, *x.shape),
        y.expand(restarts, *y.shape),
        model.config.num_components,
        activation=model.config.activation,
        temperature=model.temperature,
        min_deviation=model.config.min_deviation,
        generator=torch.Generator().manual_seed(seed),
    )
