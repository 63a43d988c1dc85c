"""Gradient and curvature of the training loss in a head's output vectors, summed while it trains.

Letters: N positions, V vocabulary, d hidden size, D = d + 1 whitened coordinates.

With hidden states h, labels y, probabilities q of the head, and t the slope of the family's scale
and soft-cap, a window of training gives

    gradient_v = sum (q_v - y_v) t h,    curvature_v = sum q_v (1 - q_v) t^2,
    context_v = sum q_v (1 - q_v) t^2 h,    spread_v = sum (q_v - y_v)^2 t^2,

and the mean and covariance of h: all that `code_learning.py` moves codes by, in raw coordinates,
as which ones are white is known at the end of the window. Memory is O(V d).

Labels are a sample, where a teacher's distribution is not. Were the head right, a gradient would be
noise alone, its squared length in whitened coordinates about D times the curvature; the labels at
hand say D times the spread. By as much as the larger explains it, a gradient is drawn towards zero
(James and Stein, 1961), which leaves most rare tokens where they are. And a token that the labels
name, but the head thinks all but impossible, has next to no curvature: a step by that alone would
overshoot. So what limits the step is the larger of the two as well.

docs/fitting.md has figures.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.ops.registration import without_autocast

from .calibration import CalibrationStatistics
from .code_learning import Slope, slope_of_postprocess
from .metric import TokenMetric, token_metric
from .sign_codebook import tiles

CHUNK_BYTES = 64 << 20  # of the logits of a chunk in float32


class LossSums:
    """Sums over the positions of a window.

    Hidden states are taken about the head's `hidden_mean`, which all processes have alike: about
    zero, the few huge dimensions of trained models would cancel away the digits of the covariance.

    Args:
        head: whose forward passes are summed.
    """

    def __init__(self, head: VQLogitsHead):
        vocab_size, size = head.out_features, head.in_features
        device, exact = head.codes.device, torch.float64
        self._origin = head.hidden_mean.detach().float()
        self._unit = head.logit_scale**2
        self._count = torch.zeros((), dtype=exact, device=device)
        self._gradient = torch.zeros(vocab_size, size, device=device)
        self._bias_gradient = torch.zeros(vocab_size, device=device)
        self._context = torch.zeros(vocab_size, size, device=device)
        self._curvature = torch.zeros(vocab_size, device=device)
        self._spread = torch.zeros(vocab_size, device=device)
        self._probability = torch.zeros(vocab_size, device=device)
        self._hidden = torch.zeros(size, dtype=exact, device=device)
        self._products = torch.zeros(size, size, dtype=exact, device=device)

    @property
    def positions(self) -> int:
        """N, of all processes once they are [`reduce`]d."""
        return int(self._count)

    @property
    def finite(self) -> bool:
        """False where a loss of the window was not."""
        return bool(torch.isfinite(self._bias_gradient).all())

    @torch.no_grad()
    def add(
        self, head: VQLogitsHead, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0
    ) -> None:
        """Add positions.

        Args:
            head: with whole tensors, as within its `forward`.
            hidden: (n, d), finite.
            labels: (n,), in 0..V-1.
            label_smoothing: as in `torch.nn.functional.cross_entropy`.
        """
        with without_autocast(hidden.device):
            size = max(1, CHUNK_BYTES // (4 * head.out_features))
            for h, y in zip(hidden.split(size), labels.split(size), strict=True):
                self._add_chunk(head, h, y, label_smoothing)

    def reduce(self) -> None:
        """Add up the sums of all processes, in each of them."""
        for tensor in vars(self).values():
            if torch.is_tensor(tensor) and tensor is not self._origin:
                dist.all_reduce(tensor)

    def metric(self, head: VQLogitsHead) -> TokenMetric:
        """The metric of the window about the vectors that the head's tokens have.

        Args:
            head: with whole tensors.
        """
        shift = self._hidden / self._count
        seen = self._curvature > 0
        context = self._context / torch.where(seen, self._curvature, 1.0)[:, None]
        statistics = CalibrationStatistics(
            positions=self.positions,
            mean=self._origin.double() + shift,
            covariance=self._products / self._count - torch.outer(shift, shift),
            fisher=self._curvature.double() / self._unit,
            context=torch.where(seen[:, None], context, shift.float()) + self._origin,
            probability=self._probability.double(),
            shift_invariant=False,  # or tokens would be drawn to vectors that they do not have
        )
        weight, bias = head.to_linear()
        return token_metric(weight, statistics, bias=bias)

    def slope(self, metric: TokenMetric) -> Slope:
        """Gradient, drawn towards zero by its noise, and what limits the step.

        Args:
            metric: that of the window, in whose coordinates they are.
        """
        limit = torch.maximum(self._curvature, self._spread)
        about_mean = self._bias_gradient[:, None] * (self._origin - metric.mean)
        gradient = (self._gradient + about_mean) @ metric.unwhiten.T
        gradient = torch.cat([gradient, self._bias_gradient[:, None]], 1)
        for tile in tiles(len(gradient)):
            part = gradient[tile]
            length = (part * metric.shrink(part, tile)).sum(1)
            noise = part.shape[1] * limit[tile]
            share = 1 - noise / length.clamp_min(torch.finfo(length.dtype).tiny)
            part *= share.clamp_min(0)[:, None]
        return Slope(gradient, limit)

    def _add_chunk(
        self, head: VQLogitsHead, hidden: Tensor, labels: Tensor, label_smoothing: float
    ) -> None:
        # Not `head(...)`: this is called by a hook of it.
        logits = head.forward(hidden.to(head.codebook.dtype)).float()
        inner = slope_of_postprocess(head, logits)
        q = torch.softmax(logits, -1)
        centred = hidden.float() - self._origin
        self._count += len(hidden)
        self._hidden += centred.double().sum(0)
        self._products += centred.double().T @ centred.double()
        self._probability += q.sum(0)
        weights = torch.addcmul(q, q, q, value=-1).mul_(inner.square())
        self._curvature += weights.sum(0)
        self._context.addmm_(weights.T, centred)
        q[torch.arange(len(q), device=q.device), labels] -= 1 - label_smoothing
        if label_smoothing:
            q -= label_smoothing / q.shape[1]
        q *= inner
        self._bias_gradient += q.sum(0)
        self._spread += q.square().sum(0)
        self._gradient.addmm_(q.T, centred)
