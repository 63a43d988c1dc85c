"""Data around zero and of size one, and what a mixture fitted to them is for the data as they are.

Letters: N observations, d width of x, p width of y; `...` stands for leading axes of independent
mixtures of the same data.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..gates import LINEAR
from .mixture import Mixture


@dataclass(frozen=True)
class Standardisation:
    """(x - centre) / scale for every column of x, and for y with one scale for all its columns.

    So a deviation of y is the same number of units in every direction. With an activation x has no
    centre but zero, since its gate has no bias that could stand for one.

    Attributes:
        x_centre: (d,).
        x_scale: (d,), positive.
        y_centre: (p,).
        y_scale: (), positive.
    """

    x_centre: Tensor
    x_scale: Tensor
    y_centre: Tensor
    y_scale: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, activation: str) -> "Standardisation":
        """That of data.

        Args:
            x: (N, d).
            y: (N, p).
            activation: of the gate.
        """
        x_centre = _means(x) if activation == LINEAR else torch.zeros_like(x[0])
        y_centre = _means(y)
        y_scale = _sizes((y - y_centre).reshape(-1, 1))[0]
        return cls(x_centre, _sizes(x - x_centre), y_centre, y_scale)

    def inputs(self, x: Tensor) -> Tensor:
        """Standardise x (N, d)."""
        return (x - self.x_centre) / self.x_scale

    def targets(self, y: Tensor) -> Tensor:
        """Standardise y (N, p)."""
        return (y - self.y_centre) / self.y_scale

    @property
    def log_density_shift(self) -> float:
        """The log density of the data as they are, less that of the standardised ones."""
        return -len(self.y_centre) * float(self.y_scale.log())

    def inward(self, mixture: Mixture) -> Mixture:
        """The mixture of standardised data that is this one of the data as they are."""
        biases = mixture.biases
        if mixture.activation == LINEAR:
            biases = biases + mixture.slopes @ self.x_centre
        at_centre = mixture.intercepts + mixture.coefficients @ self.x_centre
        return replace(
            mixture,
            slopes=mixture.slopes * self.x_scale,
            biases=biases,
            coefficients=mixture.coefficients * (self.x_scale / self.y_scale),
            intercepts=(at_centre - self.y_centre) / self.y_scale,
            factors=mixture.factors / self.y_scale,
        )

    def outward(self, mixture: Mixture) -> Mixture:
        """The mixture of the data as they are that is this one of standardised data."""
        slopes = mixture.slopes / self.x_scale
        coefficients = mixture.coefficients * (self.y_scale / self.x_scale)
        biases = mixture.biases
        if mixture.activation == LINEAR:
            biases = biases - slopes @ self.x_centre
        at_centre = mixture.intercepts * self.y_scale + self.y_centre
        return replace(
            mixture,
            slopes=slopes,
            biases=biases,
            coefficients=coefficients,
            intercepts=at_centre - coefficients @ self.x_centre,
            factors=mixture.factors * self.y_scale,
        )


def _means(values: Tensor) -> Tensor:
    """Of columns (N, width), whose sum may be beyond the largest number."""
    largest = _largest(values)
    return (values / largest).mean(0) * largest


def _sizes(values: Tensor) -> Tensor:
    """Root mean squares of columns (N, width), 1 where that is zero."""
    largest = _largest(values)
    found = (values / largest).square().mean(0).sqrt() * largest
    return found.where(found > 0, torch.ones_like(found))


def _largest(values: Tensor) -> Tensor:
    found = values.abs().amax(0)
    return found.where(found > 0, torch.ones_like(found))
