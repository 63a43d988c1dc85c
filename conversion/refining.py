"""Fitting of a refinement: the error of every token's logit, and how far below the best to look.

Letters: N positions, V vocabulary, d hidden size, D = d + 1, T candidates. In whitened coordinates
(`metric.py`) a token's error is a vector e, and what it adds to the logit of a position is e . x,
x being the whitened hidden state, of covariance I, with one more coordinate 1. So |e| is the
deviation of that error, and |e| |x| a bound on it.

SmolLM2-135M at 99%, by the fit alone, positions of WikiText-2 and of novels: for the dense layer's
choice to be within the rule at 99.9% it has to score 22 and 55 tokens with the errors in each
token's own contexts (as the metric weighs them) in the place of |e| and without rho; 22 and 28 with
|e| and |x|; 19 and 37 with |e| and rho, which needs no d x d product; 47 and 170 with the same
distance for all tokens. Looking from the best dense score down in the place of the best quantised
one takes 61 and 111.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_vqlogits import VQLogitsConfig, VQLogitsHead
from hf_vqlogits.refinement import Refinement

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
        length: (V,) float32, |e|, times the family's scale of logits.
        common: (D,) float32, what all tokens' errors have in common, left out there; zero where a
            constant added to all logits is not free.
    """

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
    scale = parts.transform.scale
    return LogitErrors(scale * (error - common).norm(dim=1), scale * common)


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

        def refined(hidden: Tensor) -> Tensor:
            return self.refinement(
                hidden,
                head(hidden),
                weight=parts.weight,
                logit_scale=head.logit_scale,
                final_logit_softcapping=head.final_logit_softcapping,
            )

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
        values, tokens = quantised.topk(self.refinement.top_k)
        within = self.refinement.within(hidden, values, tokens)
        scored = torch.zeros_like(quantised, dtype=torch.bool).scatter_(1, tokens, within)
        best = self.logits(parts, head)(own).float().amax(-1, keepdim=True)
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
    refinement.bias, refinement.error = bias.float(), errors.length.to(bias.device)
    deviation = statistics.covariance.diagonal().clamp_min(0).sqrt()
    deviation = deviation.clamp_min(1e-3 * deviation.max().clamp_min(1e-6))
    refinement.mean = statistics.mean.float().to(bias.device)
    refinement.spread = deviation.float().to(bias.device)
    vector, offset = metric.product_form(errors.common[None])
    refinement.common, refinement.common_bias = vector[0].to(bias.device), offset.to(bias.device)
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
        choice = parts.raw_logits(some.to(parts.weight.dtype)).argmax(-1, keepdim=True)
        values, tokens = head.topk(some.to(head.codebook.dtype), refinement.top_k)
        distance = refinement.distance(some, values, tokens)
        found.append(distance.masked_fill(tokens != choice, math.inf).amin(-1))
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
