"""Fitting of a refinement: the error of every token's logit, and how far below the best to look.

Letters: N positions, V vocabulary, d hidden size, D = d + 1, T candidates. In whitened coordinates
(`metric.py`) a token's error is a vector e, and what it adds to the logit of a position is e . x,
x being the whitened hidden state with one more coordinate 1.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_vqlogits import VQLogitsConfig, VQLogitsHead
from hf_vqlogits.refinement import Refinement, rows_of

from .calibration import CalibrationStatistics
from .comparison import Logits
from .families import SourceParts
from .metric import TokenMetric

CHUNK_ROWS = 256  # positions whose V logits exist at a time
CERTIFIED_ON = 4096  # positions, at most


@dataclass
class LogitErrors:
    """What quantisation changed in the output vectors, in whitened coordinates.

    Attributes:
        deviation: (V,) float32, s_v: root mean square of e . x over the positions where token v is
            likely, by the metric's own weight of contexts; times the family's scale of logits.
        length: (V,) float32, |e| likewise: no position's error is above |e| |x|.
        common: (D,) float32, what all tokens' errors have in common, left out of both; zero where a
            constant added to all logits is not free.
    """

    deviation: Tensor
    length: Tensor
    common: Tensor


def logit_errors(
    parts: SourceParts, metric: TokenMetric, head: VQLogitsHead, probability: Tensor
) -> LogitErrors:
    """Errors of a head's output vectors.

    Args:
        parts: the source.
        metric: of its dense layer.
        head: the substitute.
        probability: (V,), how much of it each token has on the calibration text, in any unit.
    """
    weight, bias = (part.float() for part in head.to_linear())
    weight -= parts.weight
    if parts.bias is not None:
        bias -= parts.bias
    error = metric.whitened_form(weight, bias)
    share = (probability / probability.sum()).to(error)
    free = parts.transform.softcap is None  # else a constant added to all logits is not
    common = share @ error if free else error.new_zeros(error.shape[1])
    error -= common
    square = error.square().sum(1)
    along = (error * metric.context).sum(1).square()
    scale = parts.transform.scale
    return LogitErrors(scale * (square + along).sqrt(), scale * square.sqrt(), scale * common)


@dataclass
class RefinementScore:
    """What a refinement does on a text.

    Attributes:
        scored: mean number of tokens a position that are scored again.
        certified: share of positions where no error that is possible at all could make another
            token than the refined best one the dense layer's choice.
    """

    scored: float
    certified: float


@dataclass
class FittedRefinement:
    """A refinement, and what judges it.

    Attributes:
        refinement: that shares the source's output weight.
        metric: of the dense layer.
        errors: of the head.
    """

    refinement: Refinement
    metric: TokenMetric
    errors: LogitErrors

    def logits(self, parts: SourceParts, head: VQLogitsHead) -> Logits:
        """Refined logits: hidden states (n, d) -> (n, V)."""
        rows = rows_of(parts.weight)

        def refined(hidden: Tensor) -> Tensor:
            return self.refinement(hidden, head(hidden), rows=rows, postprocess=head.postprocess)

        return refined

    @torch.no_grad()
    def judge(
        self, parts: SourceParts, head: VQLogitsHead, batches: Iterable[Tensor]
    ) -> RefinementScore:
        """Count what is scored, and what is certain, on the first `CERTIFIED_ON` positions.

        Args:
            parts: the source.
            head: of the converted model.
            batches: hidden states (n, d).

        Raises:
            ValueError: there are no positions.
        """
        scored, certain, positions = 0, 0, 0
        for batch in batches:
            for hidden in batch[: CERTIFIED_ON - positions].split(CHUNK_ROWS):
                counts = self._count(parts, head, hidden)
                scored, certain = scored + counts[0], certain + counts[1]
                positions += len(hidden)
            if positions >= CERTIFIED_ON:
                break
        if not positions:
            raise ValueError("There are no positions to judge the refinement on.")
        return RefinementScore(scored / positions, certain / positions)

    def _count(self, parts: SourceParts, head: VQLogitsHead, hidden: Tensor) -> tuple[int, int]:
        """Tokens scored again, and positions certified, of hidden states (n, d)."""
        own = hidden.to(head.codebook.dtype)
        quantised = head(own).float() - self.refinement.offset(hidden)
        tokens = quantised.topk(self.refinement.top_k).indices
        refined = self.logits(parts, head)(own).float()
        best = refined.gather(1, tokens).amax(-1, keepdim=True)
        scored = torch.zeros_like(quantised, dtype=torch.bool)
        z = self.refinement.deviations
        if z is None:
            scored.scatter_(1, tokens, True)
        else:
            possible = quantised + z * self.refinement.error.float() >= best
            scored.scatter_(1, tokens, possible.gather(1, tokens))
        x = (hidden.float() - self.metric.mean) @ self.metric.unwhiten.T
        x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        # A soft-cap makes differences smaller, never larger.
        most = quantised + self.errors.length * x.norm(dim=1, keepdim=True)
        others = most.masked_fill_(scored, -math.inf).amax(-1, keepdim=True)
        return int(scored.sum()), int((others < best).sum())


def fit_refinement(
    parts: SourceParts,
    config: VQLogitsConfig,
    head: VQLogitsHead,
    metric: TokenMetric,
    statistics: CalibrationStatistics,
    batches: Iterable[Tensor],
    agreement: float,
) -> FittedRefinement:
    """A refinement of a head.

    Args:
        parts: the source.
        config: its `refine_top_k` is T, and `refine_with_embedding` says whose the rows are.
        head: of the converted model.
        metric: of the dense layer.
        statistics: of the calibration text.
        batches: hidden states (n, d) that the head was not trained on; without any, all candidates
            are scored.
        agreement: share of their positions where the dense layer's choice shall be scored again.
    """
    errors = logit_errors(parts, metric, head, statistics.probability)
    with torch.device("meta"):
        refinement = Refinement(config)
    if refinement.weight is not None:
        refinement.weight = torch.nn.Parameter(parts.weight, requires_grad=False)
    bias = parts.weight.new_zeros(len(parts.weight)) if parts.bias is None else parts.bias
    refinement.bias, refinement.error = bias.float(), errors.deviation.to(bias.device)
    vector, offset = metric.product_form(errors.common[None])
    refinement.common, refinement.common_bias = vector[0].to(bias.device), offset.to(bias.device)
    found = [_distance_of_choice(parts, head, refinement, hidden) for hidden in batches]
    refinement.deviations = deviations_for(torch.cat(found), agreement) if found else None
    return FittedRefinement(refinement, metric, errors)


@torch.no_grad()
def _distance_of_choice(
    parts: SourceParts, head: VQLogitsHead, refinement: Refinement, hidden: Tensor
) -> Tensor:
    """By how many deviations the quantised logit of the dense layer's choice is too small, (n,).

    Not below 0, and infinite where it is no candidate.
    """
    found = []
    for some in hidden.split(CHUNK_ROWS):
        dense = parts.logits(some.to(parts.weight.dtype)).float()
        best, choice = dense.max(-1, keepdim=True)
        values, tokens = head.topk(some.to(head.codebook.dtype), refinement.top_k)
        less = best - (values - refinement.offset(some))
        error = refinement.error[tokens].clamp_min(torch.finfo(torch.float32).tiny)
        distance = (less / error).clamp_min(0.0).masked_fill(tokens != choice, math.inf)
        found.append(distance.amin(-1))
    return torch.cat(found)


def deviations_for(distances: Tensor, agreement: float) -> float | None:
    """The least z with which the dense layer's choice is scored again at a share of positions.

    Args:
        distances: (N,), by how many deviations that choice's quantised logit is too small;
            infinite where it is no candidate.
        agreement: the share, above 0 and at most 1.

    Returns:
        z; None where too many are no candidates, so that all candidates have to be scored.
    """
    z = float(distances.sort().values[math.ceil(agreement * len(distances)) - 1])
    return z if math.isfinite(z) else None
