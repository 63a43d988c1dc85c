"""What goes into a peer, and what comes out.

Letters, in all of `benchmarks.peers`: V vocabulary, d hidden size, h a hidden state.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_vqlogits.conversion.calibration import CalibrationStatistics
from hf_vqlogits.conversion.quantise import Quantiser

from ..protocol import Case

HALF = 2  # bytes of a float of 16 bits


class UnavailableError(Exception):
    """A peer's library is not there, or not for this machine; the message is the reason."""


@dataclass
class Layer:
    """A dense output layer with its text.

    Attributes:
        case: model and texts.
        quantiser: this package's own.
        statistics: of the calibration text, the same for all.
    """

    case: Case
    quantiser: Quantiser
    statistics: CalibrationStatistics

    @property
    def weight(self) -> Tensor:
        """(V, d) float32."""
        return self.case.parts.weight.detach()

    def second_moment(self) -> Tensor:
        """E[h h^T] on calibration text, (d, d) float64, positive definite."""
        mean = self.statistics.mean
        return self.statistics.regularised_covariance() + torch.outer(mean, mean)


@dataclass(frozen=True)
class Compressed:
    """A layer as its bytes decode to, computed with in float32 whoever made it.

    Attributes:
        weight: (V, d) float32.
        total_bytes: of all that the layer needs: codes, scales, zero points, biases, codewords.
        bias: (V,) float32, or None.
        details: what the maker tells.
    """

    weight: Tensor
    total_bytes: int
    bias: Tensor | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """All bytes, in bits, over V d."""
        return 8 * self.total_bytes / self.weight.numel()

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) of hidden states (N, d)."""
        return nn.functional.linear(hidden, self.weight, self.bias)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of so many codes of so many bits, without gaps."""
    return -(-count * bits // 8)


def through(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 values, rounded to what another type can hold."""
    return values.to(dtype).float()
