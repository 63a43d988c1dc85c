"""Configuration of a Gaussian mixture of experts."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..gates import LINEAR, check_activation, check_temperature


@strict
class GaussianMoEConfig(PreTrainedConfig):
    r"""Configuration of [`GaussianMoEModel`], p(y | x) = sum_i gate_i(x) N(A_i x + b_i, nu_i).

    Args:
        input_size (`int`, *optional*, defaults to 1):
            d, the width of x; at least 1.
        output_size (`int`, *optional*, defaults to 1):
            p, the width of y; at least 1.
        num_components (`int`, *optional*, defaults to 2):
            k; at least 1.
        activation (`str`, *optional*, defaults to `"linear"`):
            What the gate's linear part goes through before the bias is added and the temperature
            divides: `"linear"` (the plain gate), `"sigmoid"`, `"tanh"`, `"gelu"` or `"silu"`.
        temperature (`float`, *optional*, defaults to 1.0):
            tau at the beginning, positive; a saved model holds the one it had.
        learn_temperature (`bool`, *optional*, defaults to `False`):
            Whether tau is fitted with the rest. Otherwise it is fixed, or scheduled.
        min_deviation (`float`, *optional*, defaults to 0.001):
            No component's standard deviation goes below it in any direction of y, in the units of
            y; positive. A component that a few observations pull towards zero stays there, so
            that the likelihood has a maximum. In EM at a ten-millionth of its largest deviation at
            the latest, which is where float64 ends.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> GaussianMoEConfig(input_size=3, num_components=4, activation="sigmoid").temperature
        1.0
    """

    model_type = "gaussian_moe"

    input_size: int = 1
    output_size: int = 1
    num_components: int = 2
    activation: str = LINEAR
    temperature: float | int = 1.0
    learn_temperature: bool = False
    min_deviation: float | int = 1e-3

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields; the strict dataclass would wrap what is raised in another error."""
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Check the fields.

        Raises:
            ValueError: names the field, its value and what is allowed.
        """
        for name in ("input_size", "output_size", "num_components"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        check_activation(self.activation)
        check_temperature(self.temperature)
        if not 0 < self.min_deviation < math.inf:
            raise ValueError(
                f"`min_deviation` must be positive and finite, got {self.min_deviation}: without "
                "it a component on a single observation makes the likelihood infinite."
            )
