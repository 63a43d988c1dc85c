"""How far a fit is from the rate-distortion bound of a Gaussian source in the token metric.

Letters: V vocabulary, D = d + 1 whitened coordinates, R bits a token on average.

**Source.** The metric counts token v's error e as w_v (|e|^2 + (m_v . e)^2), the weights sum to 1.
The rows x_v are taken as independent draws of a normal distribution with mean 0 and the weighted
covariance C = sum_v w_v x_v x_v^T, whatever the token. Let the decoder know all w_v and m_v, which
in fact it does not; that can only lower the bound.

**The contexts drop out.** The second term is never negative, so the error is at least
sum_v w_v |e_v|^2, whose bound needs the eigenvalues lambda_i of C alone. Little is lost by that: it
is the same to measure |e|^2 in coordinates stretched by sqrt(1 + |m_v|^2) along m_v, which a
decoder that knows m_v makes up for by log2(1 + |m_v|^2) / 2 bits in that one direction, two or
three of hundreds. (Pooling the stretched rows of all tokens into one covariance instead would
spread every m_v over all directions, and give no bound: fits lie at a fifth of it.)

**Fixed rate.** R bits for every token give at least (reverse water-filling; Shannon, 1959; Cover
and Thomas, "Elements of information theory", theorem 10.3.3)

    D(R) = sum_i min(t, lambda_i),   t such that   sum_i max(0, log2(lambda_i / t)) / 2 = R.

**Spread rate.** If tokens may have unequal numbers of bits, R_v with mean R, the least of
sum_v w_v D(R_v) is again water-filling, over the V D components of variances w_v lambda_i with one
level t for all (the slope of w_v D at R_v must be the same for all tokens with bits):

    sum_v sum_i min(t, w_v lambda_i),
    t such that   (1 / V) sum_v sum_i max(0, log2(w_v lambda_i / t)) / 2 = R.

That is the fixed rate with levels t / w_v; with equal weights both are the same.

Both are given as shares of sum_v w_v (|x_v|^2 + (m_v . x_v)^2), the error of no codes at all, as
`SignFit.details["error"]` is.

**What it is not.** Bits count codes, not codewords, which are shared by all tokens but serve those
of large weight first: with weights as uneven as a vocabulary's, where a few hundred tokens have
half of it, they are worth many bits to those. Of all sources with covariance C the normal one is
the hardest; rows that are not normal, or smaller where the weight is larger, may be coded with
less. So this is a mark to measure a search by, no bound for one matrix W.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_vqlogits.conversion.metric import TokenMetric

HALVINGS = 80  # of a bracket some hundred nats wide: to the last digit of float64


@dataclass(frozen=True)
class GaussianSource:
    """Components of variances w_v lambda_i, whose squared errors add up.

    Attributes:
        variances: lambda, float64, positive and falling, at most D.
        weights: w, (V,) float64, positive, sums to 1; a single 1 for a fixed rate.
        unit: the error of no codes at all, at least the sum of the variances.
    """

    variances: Tensor
    weights: Tensor
    unit: float

    def distortion(self, bits: float) -> float:
        """Least weighted squared error at so many bits a token, as a share of `unit`.

        Raises:
            ValueError: `bits` below 0.
        """
        if bits < 0:
            raise ValueError(f"`bits` must be at least 0, got {bits}.")
        return self._at(self._level(lambda at: at[0] < bits))[1]

    def bits(self, distortion: float) -> float:
        """Bits a token at which the bound is this share of `unit`; 0 where it always is below.

        Raises:
            ValueError: `distortion` outside of (0, 1].
        """
        if not 0 < distortion <= 1:
            raise ValueError(f"`distortion` must lie in (0, 1], got {distortion}.")
        return self._at(self._level(lambda at: at[1] > distortion))[0]

    def _level(self, too_high: Callable[[tuple[float, float]], bool]) -> float:
        """Log of the water level at which bits and error stop being `too_high`, by bisection."""
        high = float((self.variances[0] * self.weights.max()).log())  # nothing stands out of it
        low = high - 1
        while too_high(self._at(low)):
            low -= high - low
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if too_high(self._at(middle)):
                high = middle
            else:
                low = middle
        return (low + high) / 2

    def _at(self, log_level: float) -> tuple[float, float]:
        """Mean bits, and the error as a share of `unit`, at a water level."""
        logs = self.variances.log()
        levels = log_level - self.weights.log()  # t / w_v, (V,)
        above = torch.searchsorted(-logs, -levels)  # how many components stand out of the water
        nats = (pad(logs.cumsum(0), (1, 0))[above] - above * levels) / 2
        below = pad(self.variances.flip(0).cumsum(0).flip(0), (0, 1))[above]
        errors = self.weights * (below + above * levels.exp())
        return float(nats.mean()) / math.log(2), float(errors.sum()) / self.unit


def sources(metric: TokenMetric) -> dict[str, GaussianSource]:
    """The sources whose bounds hold for a metric's rows, `"fixed"` and `"spread"` rate."""
    rows, weights = metric.rows.double().cpu(), metric.weight.double().cpu()
    unit = float(metric.error(metric.rows).double().sum())
    variances = torch.linalg.eigvalsh(rows.T @ (weights[:, None] * rows)).flip(0)
    # A row space of fewer dimensions leaves eigenvalues that are only rounding.
    variances = variances[variances > variances[0] * 1e-12]
    return {
        "fixed": GaussianSource(variances, torch.ones(1, dtype=torch.float64), unit),
        "spread": GaussianSource(variances, weights / weights.sum(), unit),
    }


def compare(bounds: dict[str, GaussianSource], bits: float, error: float) -> dict[str, float]:
    """A fit beside its bounds.

    Args:
        bounds: of [`sources`].
        bits: of the fit, a token on average.
        error: of the fit, as a share of that of no codes.

    Returns:
        `error`, and for each bound its `..._bound` at these bits, `error_over_..._bound`, and
        `..._bits_at_error`, the bits at which the bound equals the fit's error.
    """
    found = {"error": error}
    for name, source in bounds.items():
        bound = source.distortion(bits)
        found[f"{name}_bound"] = bound
        found[f"error_over_{name}_bound"] = error / bound
        found[f"{name}_bits_at_error"] = source.bits(error)
    return found
