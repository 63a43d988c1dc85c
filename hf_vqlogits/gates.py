"""The dense-to-sparse gate: a softmax whose temperature sets how many components share an input.

Letters: N observations, d width of x, k components; `...` stands for leading axes of independent
gates. The gate of component i is

    softmax_i((act(beta1_i . x) + beta0_i) / tau)

with the identity for `act` in the plain gate, and with a bounded or curved function in the
activation gate (Nguyen, Akbarian and Ho, "Is Temperature Sample Efficient for Softmax Gaussian
Mixture of Experts?"). For tau to infinity all components share alike (dense); for tau to 0 the
largest takes all (sparse).

**What a gate's values leave open.** A common shift of all beta0 changes nothing, nor does, in the
plain gate, a common shift of all beta1, nor a common factor on beta1, beta0 and tau: there the
temperature alone has no meaning. An activation that is not homogeneous ends the last two freedoms.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

LINEAR = "linear"
LEAST_TEMPERATURE = 1e-20  # scores up to 1e18 stay within float32


def _identity(values: Tensor) -> Tensor:
    return values


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    LINEAR: _identity,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


def check_activation(value: str, name: str = "activation") -> None:
    """Refuse an unknown activation.

    Args:
        value: the activation.
        name: of the argument, for the message.

    Raises:
        ValueError: names those that exist.
    """
    if value not in ACTIVATIONS:
        raise ValueError(f"`{name}` must be one of {tuple(ACTIVATIONS)}, got {value!r}.")


def check_temperature(value: float, name: str = "temperature") -> None:
    """Refuse what cannot divide scores.

    Args:
        value: the temperature.
        name: of the argument, for the message.

    Raises:
        ValueError: it is not positive and finite, or so small or large that scores in float32
            divided by it are no numbers any more.
    """
    if not 0 < value < math.inf:
        raise ValueError(
            f"`{name}` must be positive and finite, got {value}: scores are divided by it. Large "
            "values share every input among all components, small ones choose one."
        )
    if not LEAST_TEMPERATURE <= value <= 1 / LEAST_TEMPERATURE:
        raise ValueError(
            f"`{name}` must lie between {LEAST_TEMPERATURE:g} and {1 / LEAST_TEMPERATURE:g}, got "
            f"{value}: scores divided by it leave the range of float32."
        )


def gate_scores(
    x: Tensor, slopes: Tensor, biases: Tensor, log_temperature: Tensor, activation: str
) -> Tensor:
    """Scores whose softmax is the gate, (act(beta1 . x) + beta0) / tau.

    Args:
        x: inputs (..., N, d).
        slopes: beta1 (..., k, d).
        biases: beta0 (..., k).
        log_temperature: log of tau (...).
        activation: one of `ACTIVATIONS`.

    Returns:
        (..., N, k).
    """
    projected = x @ slopes.mT  # (..., N, k)
    shifted = ACTIVATIONS[activation](projected) + biases[..., None, :]
    return shifted / log_temperature.exp()[..., None, None]


def activation_slope(values: Tensor, activation: str) -> Tensor:
    """Derivative of an activation, elementwise.

    Args:
        values: any shape.
        activation: one of `ACTIVATIONS`.
    """
    if activation == LINEAR:
        return torch.ones_like(values)
    with torch.enable_grad():
        inputs = values.detach().requires_grad_()
        (slope,) = torch.autograd.grad(ACTIVATIONS[activation](inputs).sum(), inputs)
    return slope


class DenseToSparseGate(nn.Module):
    """The gate with its parameters.

    Args:
        width: d.
        components: k.
        activation: one of `ACTIVATIONS`; `"linear"` is the plain gate.
        temperature: tau at the beginning.
        learn_temperature: whether tau is trained with the rest.

    Raises:
        ValueError: an unknown activation, or a temperature that is not positive and finite.
    """

    def __init__(
        self,
        width: int,
        components: int,
        *,
        activation: str = LINEAR,
        temperature: float = 1.0,
        learn_temperature: bool = False,
    ):
        super().__init__()
        check_activation(activation)
        check_temperature(temperature)
        self.activation = activation
        self.initial_temperature = temperature
        self.slopes = nn.Parameter(torch.zeros(components, width))
        self.biases = nn.Parameter(torch.zeros(components))
        # Stored whether it is trained or not, so that a scheduled temperature is saved.
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(temperature)), requires_grad=learn_temperature
        )

    @property
    def temperature(self) -> float:
        """The present tau."""
        return math.exp(float(self.log_temperature.detach()))

    @torch.no_grad()
    def set_temperature(self, value: float) -> None:
        """Set tau, as a schedule does.

        Raises:
            ValueError: it is not positive and finite.
        """
        check_temperature(value)
        self.log_temperature.fill_(math.log(value))

    def forward(self, x: Tensor) -> Tensor:
        """Log of the gate.

        Args:
            x: (..., d).

        Returns:
            (..., k); their exponentials add up to one.
        """
        scores = gate_scores(x, self.slopes, self.biases, self.log_temperature, self.activation)
        return scores.log_softmax(-1)
