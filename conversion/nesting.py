"""Heads of several sizes, each made around the finished smaller one.

Ascending: a size is fitted and distilled, then its bits are frozen, and the next one adds bits to
them. The codebook is solved for, and trained, at every size anew. So the time is about that of a
conversion to each of the sizes. The smallest is what it would be alone, and on SmolLM2-135M the
fits of 98 and 96% around it were as good as well (docs/fitting.md).
"""

from collections.abc import Mapping
from pathlib import Path

from hf_vqlogits import VQLogitsHead

from .calibration import CalibrationStatistics
from .quantise import Quantiser
from .signs import SignFit
from .sizes import HeadSize


def nested_heads(
    quantiser: Quantiser,
    size: HeadSize,
    statistics: CalibrationStatistics,
    *,
    distill_steps: int = 0,
    files: Mapping[HeadSize, Path],
) -> dict[HeadSize, VQLogitsHead]:
    """Heads of a size and of those that it holds.

    Args:
        quantiser: of the model.
        size: of sign codes.
        statistics: of the calibration text.
        distill_steps: steps of the distillation of each size.
        files: where interrupted distillations are kept, by size; empty keeps nothing. Whoever has
            no further use for them removes them.

    Returns:
        Heads by size, ascending; each holds the codebooks of those before it.

    Raises:
        ConversionError: a state file is of something else.
    """
    fitter = quantiser.sign_fitter(statistics)
    heads: dict[HeadSize, VQLogitsHead] = {}
    inside: SignFit | None = None
    for rung in size.rungs:
        with quantiser.timed("fit"):
            head = quantiser.sign_head(rung, statistics, fitter, inside=inside)
            for smaller in heads.values():
                head.hold(smaller)
        if distill_steps:
            with quantiser.timed("distillation"):
                quantiser.distill(
                    head,
                    distill_steps,
                    statistics,
                    frozen_bits=max(rung.nested_codebooks, default=0),
                    state_file=files.get(rung),
                    name="distillation" if rung == size else f"distillation {rung.num_codebooks}",
                )
        heads[rung], inside = head, _fit_of(head)
    return heads


def _fit_of(head: VQLogitsHead) -> SignFit:
    """What a head has become, as a fit of raw hidden states."""
    return SignFit(
        head.codes,
        head.score_scale * head.codebook.detach(),
        head.score_scale * head.codebook_bias.detach(),
        head.fine_ids,
        head.fine_codes,
    )
