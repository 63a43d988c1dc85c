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
    metric: TokenMetric, head: VQLogitsHead, probability: Tensor, *, shift_invariant: bool
) -> LogitErrors:
    """Errors of a head's output vectors.

    Args:
        metric: of the dense layer.
        head: its substitute.
        probability: (V,), how much of it each token has on the calibration text, in any unit.
        shift_invariant: a constant added to all logits changes nothing.
    """
    weight, bias = (part.float() for part in head.to_linear())
    error = metric.whitened_form(weight, bias).sub_(metric.rows)
    share = (probability / probability.sum()).to(error)
    common = share @ error if shift_invariant else error.new_zeros(error.shape[1])
    error -= common
    square = error.square().sum(1)
    along = (error * metric.context).sum(1).square()
    scale = head.logit_scale
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
        logits = head(own)
        values, tokens = logits.topk(self.refinement.top_k)
        within = self.refinement.within(values, tokens)
        exact = self.refinement.rescore(
            own, values, tokens, rows=rows_of(parts.weight), postprocess=head.postprocess
        )
        best = exact.masked_fill(~within, -math.inf).amax(-1).float()
        x = (hidden.float() - self.metric.mean) @ self.metric.unwhiten.T
        x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        # A soft-cap makes differences smaller, never larger.
        most = logits.float() - (x @ self.errors.common)[:, None]
        most += self.errors.length * x.norm(dim=1, keepdim=True)
        rescored = torch.zeros_like(most, dtype=torch.bool).scatter_(1, tokens, within)
        others = most.masked_fill_(rescored, -math.inf).amax(-1)
        return int(within.sum()), int((others < best).sum())


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
    errors = logit_errors(
        metric, head, statistics.probability, shift_invariant=statistics.shift_invariant
    )
    with torch.device("meta"):
        refinement = Refinement(config)
    if refinement.weight is not None:
        refinement.weight = torch.nn.Parameter(parts.weight, requires_grad=False)
    bias = parts.weight.new_zeros(len(parts.weight)) if parts.bias is None else parts.bias
    refinement.bias, refinement.error = bias.float(), errors.deviation.to(bias.device)
    found = [_distance_of_choice(parts, head, refinement, hidden) for hidden in batches]
    refinement.deviations = deviations_for(torch.cat(found), agreement) if found else None
    return FittedRefinement(refinement, metric, errors)


@torch.no_grad()
def _distance_of_choice(
    parts: SourceParts, head: VQLogitsHead, refinement: Refinement, hidden: Tensor
) -> Tensor:
    """How far below the best logit the dense layer's choice lies, (n,); infinite below the T-th."""
    found = []
    for some in hidden.split(CHUNK_ROWS):
        wanted = parts.raw_logits(some.to(parts.weight.dtype)).argmax(-1, keepdim=True)
        values, tokens = head.topk(some.to(head.codebook.dtype), refinement.top_k)
        distance = refinement.distance(values, tokens)
        found.append(distance.masked_fill(tokens != wanted, math.inf).amin(-1))
    return torch.cat(found)


def deviations_for(distances: Tensor, agreement: float) -> float | None:
    """The least z with which the dense layer's choice is scored again at a share of positions.

    Args:
        distances: (N,) of that choice, in deviations; infinite where it is no candidate.
        agreement: the share, above 0 and at most 1.

    Returns:
        z; None where too many are no candidates, so that all candidates have to be scored.
    """
    z = float(distances.sort().values[math.ceil(agreement * len(distances)) - 1])
    return z if math.isfinite(z) else None
