"""The smallest head within a limit of perplexity: the search of `choice.py` on real heads."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_vqlogits import VQLogitsHead

from .assessment import evaluation_batches, in_own_type
from .calibration import CalibrationStatistics
from .choice import Choice, choose_bits
from .comparison import compare_heads, judge_model
from .errors import ConversionError
from .quantise import Quantiser
from .report import ConversionReport
from .size_tables import Candidate
from .sizes import HeadSize


@dataclass
class Selection:
    """The head that was chosen, and what it was chosen from.

    Attributes:
        increase: of the perplexity that was allowed.
        size: of the head.
        head: after its distillation.
        rungs: heads of the ladder, by the fit alone.
        candidates: all that was tried, smallest first.
        files: of the distillations that were kept.
    """

    increase: float
    size: HeadSize
    head: VQLogitsHead
    rungs: dict[HeadSize, VQLogitsHead]
    candidates: list[Candidate]
    files: dict[HeadSize, Path]

    def tell(self, report: ConversionReport) -> None:
        """Put into a report what was tried."""
        report.max_perplexity_increase, report.candidates = self.increase, self.candidates
        report.notes.append(
            "the evaluation text chose the size, so its perplexity flatters the head a little; "
            "judge it by another text"
        )


def select_head(
    quantiser: Quantiser,
    statistics: CalibrationStatistics,
    increase: float,
    sizes: list[HeadSize],
    *,
    ladder: list[HeadSize],
    distill_steps: int,
    files: Mapping[HeadSize, Path],
) -> Selection:
    """Fit, distil and judge heads until the smallest within a limit is found.

    Args:
        quantiser: makes the heads.
        statistics: of the calibration text.
        increase: of the perplexity of the evaluation text that is allowed, 0.02 for 2%.
        sizes: that may be chosen, ascending.
        ladder: sizes to fit first, whatever they show; without any, a third of the largest.
        distill_steps: of every candidate; 0 chooses by the fit alone.
        files: where interrupted distillations are kept, by size; empty keeps nothing. Whoever has
            no further use for them removes them.

    Returns:
        The selection.

    Raises:
        ConversionError: no size keeps within the limit, or a state file is of something else.
    """
    heads = _Heads(quantiser, statistics, distill_steps, files)
    by_bits = {size.num_codebooks: size for size in (*ladder, *sizes)}
    start = ladder or [sizes[len(sizes) // 3]]
    limit = math.log1p(increase)
    choice = choose_bits(
        limit,
        [size.num_codebooks for size in sizes],
        [size.num_codebooks for size in start],
        decay=2 * math.log(2) / quantiser.parts.weight.shape[1],
        fit=lambda bits: heads.fit(by_bits[bits]),
        distil=(lambda bits: heads.distil(by_bits[bits])) if distill_steps else None,
    )
    candidates = _candidates(choice, limit, quantiser, by_bits, heads.agreement)
    if choice.bits is None:
        raise ConversionError(_nothing_found(candidates, increase, sizes[-1]))
    size = by_bits[choice.bits]
    rungs = {rung: heads.fitted[rung] for rung in ladder}
    kept = {}
    if files and distill_steps:
        kept = {by_bits[bits]: files[by_bits[bits]] for bits in choice.judged}
    return Selection(increase, size, heads.result(size), rungs, candidates, kept)


class _Heads:
    """Makes heads and judges them on the evaluation text, whose hidden states it keeps."""

    def __init__(
        self,
        quantiser: Quantiser,
        statistics: CalibrationStatistics,
        steps: int,
        files: Mapping[HeadSize, Path],
    ):
        self._quantiser, self._statistics, self._steps = quantiser, statistics, steps
        self._files = files
        with quantiser.timed("fit"):
            self._fitter = quantiser.sign_fitter(statistics)
        with quantiser.timed("evaluation"):
            self._batches = list(evaluation_batches(quantiser))
            dense = in_own_type(quantiser, quantiser.parts.logits)
            self._dense = compare_heads(self._batches, dense, {})["dense"]
        self.fitted: dict[HeadSize, VQLogitsHead] = {}
        self.agreement: dict[HeadSize, float] = {}  # of the head that was judged last
        self._distilled: dict[HeadSize, tuple[VQLogitsHead, Any]] = {}

    def fit(self, size: HeadSize) -> float:
        with self._quantiser.timed("fit"):
            head = self._quantiser.sign_head(size, self._statistics, self._fitter)
        self.fitted[size] = head
        return self._growth(size, head)

    def distil(self, size: HeadSize) -> float:
        quantiser, head = self._quantiser, copy.deepcopy(self.fitted[size])
        with quantiser.timed("distillation"):
            state_file = self._files.get(size)
            quantiser.distill(head, self._steps, self._statistics, state_file=state_file)
        self._distilled[size] = head, quantiser.details["distillation"]
        return self._growth(size, head)

    def result(self, size: HeadSize) -> VQLogitsHead:
        """The head of this size, with what its own distillation told."""
        if not self._steps:
            return copy.deepcopy(self.fitted[size])  # it may be a rung as well
        head, self._quantiser.details["distillation"] = self._distilled[size]
        return head

    def _growth(self, size: HeadSize, head: VQLogitsHead) -> float:
        """Ln of the perplexity factor, in the type that will be written."""
        quantiser = self._quantiser
        written = copy.deepcopy(head).to(quantiser.parts.weight.dtype)
        with quantiser.timed("evaluation"):
            score = judge_model(self._batches, in_own_type(quantiser, written), self._dense.choices)
        self.agreement[size] = score.agreement
        return score.nats - self._dense.nats


def _candidates(
    choice: Choice,
    limit: float,
    quantiser: Quantiser,
    by_bits: dict[int, HeadSize],
    agreement: Mapping[HeadSize, float],
) -> list[Candidate]:
    vocab_size, hidden_size = quantiser.parts.weight.shape
    candidates = []
    for bits, growth in sorted(choice.fitted.items()):
        judged = choice.judged.get(bits)
        floats = by_bits[bits].stored_codewords * (hidden_size + 1)
        candidates.append(
            Candidate(
                num_codebooks=bits,
                bits_per_token=bits * (1 + by_bits[bits].num_fine_tokens / vocab_size),
                param_reduction=1 - floats / (vocab_size * hidden_size),
                fit_factor=math.exp(growth),
                factor=None if judged is None else math.exp(judged),
                greedy_agreement=agreement[by_bits[bits]],
                passed=None if judged is None else judged <= limit,
                chosen=bits == choice.bits,
            )
        )
    return candidates


def _nothing_found(candidates: list[Candidate], increase: float, largest: HeadSize) -> str:
    best = min(candidates, key=lambda c: c.fit_factor if c.factor is None else c.factor)
    factor = best.fit_factor if best.factor is None else best.factor
    how = "by the fit alone" if best.factor is None else "as it would be written"
    return (
        f"`max_perplexity_increase` {increase} was not reached: of sizes up to "
        f"{largest.num_codebooks:,} bits, the best that was tried has {best.num_codebooks:,} and a "
        f"perplexity factor of {factor:.4f}, {how}, where {1 + increase:.4g} is allowed. Allow "
        f"more, or give more calibration text, nearer to the evaluation text."
    )
