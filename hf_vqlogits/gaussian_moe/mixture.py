"""The Gaussian mixture of experts as a function of its parameters, for many mixtures at once.

    p(y | x) = sum_i gate_i(x) N(y; A_i x + b_i, L_i L_i^T)

Letters: N observations, d width of x, p width of y, k components; `...` stands for leading axes of
independent mixtures, each with data of its own. The paper's nu_i, a variance, is L_i L_i^T.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..gates import LINEAR, gate_scores

TENSORS = ("slopes", "biases", "log_temperature", "coefficients", "intercepts", "factors")


@dataclass(frozen=True)
class Mixture:
    """Parameters of mixtures.

    Attributes:
        slopes: beta1 of the gates (..., k, d).
        biases: beta0 of the gates (..., k).
        log_temperature: log of tau (...).
        coefficients: A of the experts (..., k, p, d).
        intercepts: b of the experts (..., k, p).
        factors: L, lower triangular with a positive diagonal (..., k, p, p).
        activation: of the gates.
    """

    slopes: Tensor
    biases: Tensor
    log_temperature: Tensor
    coefficients: Tensor
    intercepts: Tensor
    factors: Tensor
    activation: str = LINEAR

    def map(self, function: Callable[[Tensor], Tensor]) -> "Mixture":
        """The mixture with a function applied to every tensor."""
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in TENSORS}
        return replace(self, **changed)

    @property
    def covariances(self) -> Tensor:
        """L L^T, the paper's nu (..., k, p, p)."""
        return self.factors @ self.factors.mT

    @property
    def weights(self) -> Tensor:
        """exp(beta0 / tau), divided by their sum: (..., k).

        The shares of the components where the activation gives all of them the same; a common
        shift of beta0 leaves them.
        """
        return (self.biases / self.log_temperature.exp()[..., None]).softmax(-1)

    def log_gates(self, x: Tensor) -> Tensor:
        """Log of the gates at x (..., N, d): (..., N, k)."""
        scores = gate_scores(x, self.slopes, self.biases, self.log_temperature, self.activation)
        return scores.log_softmax(-1)

    def means(self, x: Tensor) -> Tensor:
        """Means of the experts at x (..., N, d): (..., N, k, p)."""
        k, p, d = self.coefficients.shape[-3:]
        flat = x @ self.coefficients.reshape(*self.coefficients.shape[:-3], k * p, d).mT
        return flat.unflatten(-1, (k, p)) + self.intercepts[..., None, :, :]

    def whitened(self, x: Tensor, y: Tensor) -> Tensor:
        """Residuals of every expert in its own standard deviations, L^-1 (y - mean).

        Args:
            x: (..., N, d).
            y: (..., N, p).

        Returns:
            (..., N, k, p).
        """
        residuals = y[..., None, :] - self.means(x)
        if residuals.shape[-1] == 1:  # several times faster than a solve of 1 x 1 systems
            return residuals / self.factors[..., None, :, :, 0]
        turned = residuals.transpose(-3, -2).mT  # (..., k, p, N)
        solved = torch.linalg.solve_triangular(self.factors, turned, upper=False)
        return solved.mT.transpose(-3, -2)

    def log_normal(self, whitened: Tensor) -> Tensor:
        """Log density of every expert, from whitened residuals (..., N, k, p): (..., N, k)."""
        log_volume = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # (..., k)
        constant = 0.5 * whitened.shape[-1] * math.log(2 * math.pi)
        return -0.5 * whitened.square().sum(-1) - (log_volume + constant)[..., None, :]

    def log_joint(self, x: Tensor, y: Tensor) -> Tensor:
        """log(gate_i(x) N_i(y)) of every component (..., N, k)."""
        return self.log_gates(x) + self.log_normal(self.whitened(x, y))

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """The log of p(y | x) for every observation (..., N)."""
        return self.log_joint(x, y).logsumexp(-1)

    def mean(self, x: Tensor) -> Tensor:
        """E[y | x] (..., N, p)."""
        return (self.log_gates(x).exp()[..., None] * self.means(x)).sum(-2)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw one y for every x.

        Args:
            x: (..., N, d).
            generator: of the random numbers.

        Returns:
            (..., N, p).
        """
        gates = self.log_gates(x).exp()
        uniform = torch.rand(
            *gates.shape[:-1], 1, generator=generator, dtype=x.dtype, device=x.device
        )
        above = (uniform > gates.cumsum(-1)).sum(-1)  # (..., N)
        chosen = above.clamp(max=gates.shape[-1] - 1)[..., None, None]
        means = self.means(x).take_along_dim(chosen, -2)[..., 0, :]
        noise = torch.randn(means.shape, generator=generator, dtype=x.dtype, device=x.device)
        spread = torch.einsum("...kpq,...nq->...nkp", self.factors, noise)
        return means + spread.take_along_dim(chosen, -2)[..., 0, :]

    def anchored(self) -> "Mixture":
        """The same mixture with the last component's gate at zero, where that changes nothing.

        beta0 of the last component becomes 0, and in the plain gate beta1 as well, which is the
        paper's convention. With an activation beta1 has no such freedom.
        """
        biases = self.biases - self.biases[..., -1:]
        if self.activation != LINEAR:
            return replace(self, biases=biases)
        return replace(self, biases=biases, slopes=self.slopes - self.slopes[..., -1:, :])

    def at_unit_temperature(self) -> "Mixture":
        """The same mixture of a plain gate with tau = 1: beta1 / tau and beta0 / tau.

        Raises:
            ValueError: the gate has an activation, in which beta1 and tau are different things.
        """
        if self.activation != LINEAR:
            raise ValueError(
                "Only the plain gate has an equal of temperature 1; got `activation` "
                f"{self.activation!r}."
            )
        tau = self.log_temperature.exp()
        return replace(
            self,
            slopes=self.slopes / tau[..., None, None],
            biases=self.biases / tau[..., None],
            log_temperature=torch.zeros_like(tau),
        )
