"""Small output layers with the statistics of a text, for the tests of the sign codes."""

from typing import Any

import torch

from hf_vqlogits.conversion.calibration import CalibrationStatistics, StatisticsAccumulator
from hf_vqlogits.conversion.metric import TokenMetric, token_metric
from hf_vqlogits.conversion.signs import SignFit, SignFitter


def problem(
    *, vocab: int, size: int, positions: int = 400, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, CalibrationStatistics]:
    """Weight (V, d), bias (V,) and statistics of hidden states with an uneven spectrum."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, size, generator=generator)
    bias = torch.randn(vocab, generator=generator)
    accumulator = StatisticsAccumulator(weight, bias=bias)
    accumulator.update(hidden_states(positions, size, seed=seed + 1))
    return weight, bias, accumulator.finish()


def hidden_states(positions: int, size: int, *, seed: int = 1) -> torch.Tensor:
    """Hidden states (N, d) with a mean and falling variances."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, size + 1).rsqrt()
    return 1 + spectrum * torch.randn(positions, size, generator=generator)


def random_metric(tokens: int, size: int, *, seed: int = 0) -> TokenMetric:
    """A metric of random rows, weights and contexts; sizes (V, D)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(tokens, generator=generator) + 0.1
    return TokenMetric(
        rows=torch.randn(tokens, size, generator=generator),
        weight=weight / weight.sum(),
        context=torch.randn(tokens, size, generator=generator),
        unwhiten=torch.eye(size - 1),
        mean=torch.zeros(size - 1),
    )


def random_signs(tokens: int, bits: int, *, seed: int = 0) -> torch.Tensor:
    """Signs (V, R), int8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (tokens, bits), generator=generator, dtype=torch.int8) * 2 - 1


def fit_signs(
    weight: torch.Tensor,
    statistics: CalibrationStatistics,
    *,
    num_codebooks: int,
    num_fine_tokens: int = 0,
    **options: Any,
) -> SignFit:
    """Sign codes of one size."""
    return sign_fitter(weight, statistics, **options).fit(num_codebooks, num_fine_tokens)


def sign_fitter(
    weight: torch.Tensor,
    statistics: CalibrationStatistics,
    *,
    bias: torch.Tensor | None = None,
    device: str | None = None,
    **options: Any,
) -> SignFitter:
    """What fits sign codes to an output layer in the metric of its logits."""
    return SignFitter(token_metric(weight, statistics, bias=bias, device=device), **options)
