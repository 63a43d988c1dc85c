"""The metric in which output vectors are quantised: that of the logits on calibration text.

Letters: V vocabulary, d hidden size, D = d + 1. In whitened coordinates, where hidden states have
covariance I and the token's bias is one more coordinate, token v's error e counts

    w_v ( |e|^2 + (m_v . e)^2 ),

w_v its importance (`importance.py`), m_v along its whitened context: the first term is the error in
an average context, the second in those where the token is likely.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .calibration import CalibrationStatistics
from .importance import token_importance

# The expansion asks for |m_v|^2 = |context|^2, but contexts are estimated, and a fit that trusts
# them fully learns the text by heart. Tuned on SmolLM2-135M at 99% during development (6
# alternations, every second position, importance f^0.7), perplexity factor on other text with
# CONTEXT_WEIGHT 1, 0.6, 0.4, 0.25: 1.320, 1.311, 1.308, 1.311; with 3, and contexts of rare tokens
# left out: 1.332. Of the squared length of a context that one half of the text gives, the other
# half confirms 0.4 for rare tokens and 0.85 for those seen 50 times.
CONTEXT_WEIGHT = 0.4
UNSEEN_SHARE = 0.375  # of the weight, for a token that was never likely
CONFIDENCE = 4.0  # positions of Fisher weight that take the share half of the way to 1


@dataclass
class TokenMetric:
    """Whitened output vectors and what their errors cost.

    Attributes:
        rows: (V, D) float32, whitened output vectors with the bias as last coordinate.
        weight: (V,) float32, w, sums to 1.
        context: (V, D) float32, m.
        unwhiten: (d, d) float32: whitened vectors times this are vectors for centred hidden
            states.
        mean: (d,) float32, of the hidden states.
    """

    rows: Tensor
    weight: Tensor
    context: Tensor
    unwhiten: Tensor
    mean: Tensor

    def tokens(self, which: slice | Tensor) -> "TokenMetric":
        """The metric of some tokens; their weights do not sum to 1."""
        rows, weight, context = self.rows[which], self.weight[which], self.context[which]
        return TokenMetric(rows, weight, context, self.unwhiten, self.mean)

    def error(self, difference: Tensor, tokens: slice = slice(None)) -> Tensor:
        """Weighted error of each token, (n,), for differences (n, D) in whitened coordinates."""
        along = (difference * self.context[tokens]).sum(1)
        return self.weight[tokens] * (difference.square().sum(1) + along.square())

    def pull(self, difference: Tensor, tokens: slice) -> Tensor:
        """Half the gradient of `error`, (n, D), for differences (n, D)."""
        return self.stretch(difference, tokens).mul_(self.weight[tokens, None])

    def stretch(self, difference: Tensor, tokens: slice) -> Tensor:
        """(I + m m^T) e for differences e (n, D): the metric's matrix but for the weight."""
        context = self.context[tokens]
        along = (difference * context).sum(1, keepdim=True)
        return torch.addcmul(difference, along, context)

    def shrink(self, difference: Tensor, tokens: slice) -> Tensor:
        """The inverse of [`stretch`], (n, D), by the formula of Sherman and Morrison."""
        context = self.context[tokens]
        along = (difference * context).sum(1, keepdim=True)
        return difference - context * (along / (1 + context.square().sum(1, keepdim=True)))

    def product_form(self, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened codebook (R, D) to (R, d) and biases (R,) for raw hidden states."""
        vectors = codebook[:, :-1] @ self.unwhiten
        return vectors, codebook[:, -1] - vectors @ self.mean

    def whitened_form(self, vectors: Tensor, biases: Tensor) -> Tensor:
        """The inverse of [`product_form`]: (R, d) and (R,) to (R, D)."""
        whitened = torch.linalg.solve(self.unwhiten.T, vectors.T).T
        return torch.cat([whitened, (biases + vectors @ self.mean)[:, None]], 1).contiguous()


def token_metric(
    weight: Tensor,
    statistics: CalibrationStatistics,
    *,
    bias: Tensor | None = None,
    besides: Tensor | None = None,
    device: torch.device | None = None,
) -> TokenMetric:
    """Whiten output vectors and set up their metric.

    Args:
        weight: (V, d) dense output weights.
        statistics: of the calibration text.
        bias: (V,) or None.
        besides: (d, d), positive semi-definite, what errors count for besides the logits, as a
            share of the trace of the hidden states' covariance; None for nothing.
        device: of the result; default `weight`'s.

    Returns:
        The metric. Where a constant added to all logits changes nothing, the weighted mean of the
        rows is taken out, for codes have better to do than to represent it.

    Raises:
        ValueError: shapes do not fit, or the weights are not finite.
    """
    check_weights(weight, statistics, bias=bias)
    device = weight.device if device is None else device
    rows = weight.detach().to(device, torch.float32)
    mean = statistics.mean.to(device)
    # On the processor: eigh of float64 is slow or missing on some accelerators.
    covariance = statistics.regularised_covariance().cpu()
    if besides is not None:
        covariance = covariance + covariance.trace() * besides.double().cpu()
    values, vectors = torch.linalg.eigh(covariance)
    deviations = values.sqrt()
    whiten = (vectors * deviations).to(device, torch.float32)  # (d, D - 1), for output vectors
    unwhiten = (vectors / deviations).T.to(device, torch.float32).contiguous()
    offsets = rows @ mean.float()
    if bias is not None:
        offsets = offsets + bias.detach().to(device, torch.float32)

    whitened = torch.cat([rows @ whiten, offsets[:, None]], 1)
    fisher = statistics.fisher.to(device, torch.float32)
    importance = token_importance(whitened, fisher)
    # Hidden states are whitened by the inverse of what whitens output vectors.
    context = (statistics.context.to(device, torch.float32) - mean.float()) @ unwhiten.T
    share = UNSEEN_SHARE + (1 - UNSEEN_SHARE) * fisher / (fisher + CONFIDENCE)
    context = torch.nn.functional.pad(context, (0, 1), value=1.0)
    context *= (CONTEXT_WEIGHT * share).sqrt()[:, None]
    if statistics.shift_invariant:
        whitened -= importance @ whitened
    return TokenMetric(whitened, importance, context, unwhiten, mean.float())


def check_weights(
    weight: Tensor, statistics: CalibrationStatistics | None = None, *, bias: Tensor | None = None
) -> None:
    """Refuse output weights that cannot be quantised.

    Raises:
        ValueError: shapes do not fit, or there is NaN or infinity; names the rows.
    """
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"`weight` must be (V, d) with V, d >= 1, got {tuple(weight.shape)}.")
    if statistics is not None and statistics.context.shape != weight.shape:
        raise ValueError(
            f"`statistics` are of a (V, d) = {tuple(statistics.context.shape)} layer, `weight` is "
            f"{tuple(weight.shape)}; calibrate with the same weights."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` must be ({len(weight)},), got shape {tuple(bias.shape)}.")
    finite = torch.isfinite(weight).all(1)
    name = "weight"
    if bias is not None and finite.all():
        finite, name = torch.isfinite(bias), "bias"
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise ValueError(
            f"`{name}` holds NaN or infinity in {len(bad)} of {len(weight)} rows ({shown}); "
            "repair the checkpoint first."
        )
