"""A Gaussian mixture of experts as a model of Transformers: forward, loss, saving, loading."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.utils import ModelOutput

from ..gates import DenseToSparseGate
from ..loading import readable_file_errors, refuse_mismatched
from ..ops.registration import without_autocast
from .configuration_gaussian_moe import GaussianMoEConfig
from .data import check_finite, columns
from .em import LEAST_RATIO
from .mixture import Mixture

AT_THE_FLOOR = 1.1  # a deviation below so many times the least one counts as collapsed


@dataclass
class GaussianMoEOutput(ModelOutput):
    """Output of [`GaussianMoEModel`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): mean of -log p(y | x) in nats, with labels.
        prediction (`torch.Tensor` of shape `(N, p)`): E[y | x].
        gates (`torch.Tensor` of shape `(N, k)`): they add up to one.
        means (`torch.Tensor` of shape `(N, k, p)`): of every component.
    """

    loss: Tensor | None = None
    prediction: Tensor | None = None
    gates: Tensor | None = None
    means: Tensor | None = None


class GaussianExperts(nn.Module):
    """Linear-Gaussian experts N(A_i x + b_i, L_i L_i^T).

    The diagonal of L is `min_deviation` plus an exponential, so that gradient descent can neither
    leave the positive ones nor let a component collapse.

    Args:
        config: sizes and the least deviation.
    """

    def __init__(self, config: GaussianMoEConfig):
        super().__init__()
        k, p, d = config.num_components, config.output_size, config.input_size
        self.min_deviation = config.min_deviation
        self.coefficients = nn.Parameter(torch.zeros(k, p, d))
        self.intercepts = nn.Parameter(torch.zeros(k, p))
        self.log_factors = nn.Parameter(torch.zeros(k, p, p))  # of the diagonal; above it unused

    @property
    def factors(self) -> Tensor:
        """L (k, p, p), in float32 or wider: the floor would be lost beside it in 16 bits."""
        logs = self.log_factors.to(torch.promote_types(self.log_factors.dtype, torch.float32))
        diagonal = logs.diagonal(dim1=-2, dim2=-1).exp() + self.min_deviation
        return logs.tril(-1) + torch.diag_embed(diagonal)

    @torch.no_grad()
    def set_factors(self, factors: Tensor) -> None:
        """Take over L (k, p, p); a diagonal at the least deviation becomes 0.1% more."""
        least = self.min_deviation
        above = (factors.diagonal(dim1=-2, dim2=-1) - least).clamp(min=1e-3 * least)
        self.log_factors.copy_(factors.tril(-1) + torch.diag_embed(above.log()))


class GaussianMoEModel(PreTrainedModel):
    """Gaussian mixture of experts with a dense-to-sparse gate.

    Fitted by [`fit_em`], or by gradient descent as any model: Trainer takes rows with the columns
    `x` and `labels`.

    Args:
        config: of the mixture.
    """

    config_class = GaussianMoEConfig
    base_model_prefix = "model"
    main_input_name = "x"
    config: GaussianMoEConfig

    def __init__(self, config: GaussianMoEConfig):
        # `from_pretrained` sets the fields it is given after the configuration was checked.
        config.validate_architecture()
        super().__init__(config)
        self.gate = DenseToSparseGate(
            config.input_size,
            config.num_components,
            activation=config.activation,
            temperature=config.temperature,
            learn_temperature=config.learn_temperature,
        )
        self.experts = GaussianExperts(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Experts that are equal would stay so.
        if isinstance(module, DenseToSparseGate):
            initialization.normal_(module.slopes)
            initialization.zeros_(module.biases)
            initialization.copy_(
                module.log_temperature, torch.tensor(module.initial_temperature).log()
            )
        elif isinstance(module, GaussianExperts):
            initialization.normal_(module.coefficients)
            initialization.normal_(module.intercepts)
            initialization.zeros_(module.log_factors)

    @property
    def temperature(self) -> float:
        """The gate's present temperature."""
        return self.gate.temperature

    def mixture(self) -> Mixture:
        """The parameters as they enter the density; gradients flow through.

        In float32 where the model's type is narrower: densities are exponentials, and the type of
        the weights says what is stored.
        """
        stored = Mixture(
            self.gate.slopes,
            self.gate.biases,
            self.gate.log_temperature,
            self.experts.coefficients,
            self.experts.intercepts,
            self.experts.factors,
            self.config.activation,
        )
        return stored.map(lambda tensor: tensor.to(self._wide))

    @torch.no_grad()
    def set_mixture(self, mixture: Mixture) -> None:
        """Take over the parameters of a mixture of the same sizes.

        Raises:
            ValueError: its activation is another one.
        """
        if mixture.activation != self.config.activation:
            raise ValueError(
                f"The mixture's `activation` is {mixture.activation!r}, the model's "
                f"{self.config.activation!r}; the same parameters mean different gates."
            )
        self.gate.slopes.copy_(mixture.slopes)
        self.gate.biases.copy_(mixture.biases)
        self.gate.log_temperature.copy_(mixture.log_temperature)
        self.experts.coefficients.copy_(mixture.coefficients)
        self.experts.intercepts.copy_(mixture.intercepts)
        self.experts.set_factors(mixture.factors)

    def collapsed(self) -> list[int]:
        """Components whose deviation is at its floor: a few observations hold them."""
        return collapsed_components(self.experts.factors.detach(), self.config.min_deviation)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> GaussianMoEOutput | tuple[Any, ...]:
        """Gates, means and, with labels, the loss.

        Args:
            x: (N, d), or (N,) for d = 1.
            labels: y (N, p), or (N,) for p = 1.
            return_dict: False for a plain tuple.

        Returns:
            [`GaussianMoEOutput`].

        Raises:
            ValueError: a shape is not the configuration's, or a value is NaN or infinite.
        """
        x = self._columns(x, self.config.input_size, "x")
        with without_autocast(x.device):
            mixture = self.mixture()
            gates, means = mixture.log_gates(x).exp(), mixture.means(x)
            prediction = (gates[..., None] * means).sum(-2)
        loss = None if labels is None else -self.log_density(x, labels).mean()
        output = GaussianMoEOutput(loss=loss, prediction=prediction, gates=gates, means=means)
        return output.to_tuple() if return_dict is False else output

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """The log of p(y | x) for every observation.

        Args:
            x: (N, d), or (N,) for d = 1.
            y: (N, p), or (N,) for p = 1.

        Returns:
            (N,).

        Raises:
            ValueError: a shape is not the configuration's, the lengths differ, or a value is NaN
                or infinite.
        """
        x, y = self._pair(x, y)
        with without_autocast(x.device):
            return self.mixture().log_density(x, y)

    def responsibilities(self, x: Tensor, y: Tensor) -> Tensor:
        """How probably each component made each observation.

        Args:
            x: (N, d), or (N,) for d = 1.
            y: (N, p), or (N,) for p = 1.

        Returns:
            (N, k).

        Raises:
            ValueError: as `log_density`.
        """
        x, y = self._pair(x, y)
        with without_autocast(x.device):
            return self.mixture().log_joint(x, y).softmax(-1)

    @torch.no_grad()
    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw one y for every x.

        Args:
            x: (N, d), or (N,) for d = 1.
            generator: of the random numbers.

        Returns:
            (N, p).

        Raises:
            ValueError: the shape is not the configuration's, or a value is NaN or infinite.
        """
        x = self._columns(x, self.config.input_size, "x")
        with without_autocast(x.device):
            return self.mixture().sample(x, generator)

    def _pair(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self._columns(x, self.config.input_size, "x")
        y = self._columns(y, self.config.output_size, "labels")
        if len(x) != len(y):
            raise ValueError(
                f"`x` has {len(x)} rows and `labels` {len(y)}; every observation needs both."
            )
        return x, y

    def _columns(self, values: Tensor, width: int, name: str) -> Tensor:
        values = columns(values, width, name).to(self._wide)
        check_finite(values, name)
        return values

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.experts.intercepts.dtype, torch.float32)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save as [`PreTrainedModel.save_pretrained`] does, with the temperature that it has."""
        self.config.temperature = self.temperature
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint as [`PreTrainedModel.from_pretrained`] does, and check it.

        A `temperature` that is given, or that of a given configuration, replaces the stored one.

        Raises:
            ValueError: tensors are missing, too many, truncated, or of another shape than the
                configuration says, or a field that is given is out of range; the message says
                which.
        """
        path, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        keep_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        with readable_file_errors(path):
            loaded: Any = super().from_pretrained(
                path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        model, info = loaded
        if not keep_mismatched:
            refuse_mismatched(path, info["mismatched_keys"])
        for key, told in (("missing_keys", "lacks"), ("unexpected_keys", "holds unknown")):
            if info[key]:
                raise ValueError(
                    f"The checkpoint {str(path)!r} {told} {', '.join(sorted(info[key]))}: it is "
                    "not one of this model, or it is damaged. Fit and save the model again."
                )
        model.gate.set_temperature(model.config.temperature)
        return (model, info) if with_info else model


def collapsed_components(factors: Tensor, min_deviation: float) -> list[int]:
    """Indices of components whose deviation, in some direction of y, is the least one allowed.

    Args:
        factors: L (k, p, p).
        min_deviation: the floor.
    """
    # The least eigenvalue is the floor in EM, the least diagonal in gradient descent; the first is
    # never above the second.
    deviations = torch.linalg.svdvals(factors.double())
    floor = (LEAST_RATIO * deviations.amax(-1)).clamp(min=min_deviation)
    return (deviations.amin(-1) < AT_THE_FLOOR * floor).nonzero()[:, 0].tolist()
