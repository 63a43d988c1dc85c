"""Heads of several sizes, each made around the finished smaller one.

Ascending: a size is fitted and distilled, then its bits are frozen, and the next one adds bits to
them. The codebook is solved for, and trained, at every size anew. So the time is about that of a
conversion to each of the sizes. The smallest is what it would be alone, and on SmolLM2-135M the
fits of 98 and 96% around it were as good as well (docs/fitting.md).
"""

from pathlib import Path

from hf_vqlogits import VQLogitsHead

from .calibration import CalibrationStatistics
from .distillation_state import check_state_file
from .quantise import Quantiser
from .signs import SignFit
from .sizes import HeadSize


def nested_heads(
    quantiser: Quantiser,
    size: HeadSize,
    statistics: CalibrationStatistics,
    *,
    distill_steps: int = 0,
    state_file: Path | None = None,
) -> dict[HeadSize, VQLogitsHead]:
    """Heads of a size and of those that it holds.

    Args:
        quantiser: of the model.
        size: of sign codes.
        statistics: of the calibration text.
        distill_steps: steps of the distillation of each size.
        state_file: where interrupted distillations are kept, each in a file with the bits of its
            size behind this name, until all are done.

    Returns:
        Heads by size, ascending; each holds the codebooks of those before it.

    Raises:
        ConversionError: a state file is of something else.
    """
    files = {rung: _state_file_of(rung, state_file) for rung in size.rungs}
    for file in files.values():
        if file is not None:
            check_state_file(file, distill_steps)
    fitter, fit = quantiser.sign_fitter(statistics), None
    heads: dict[HeadSize, VQLogitsHead] = {}
    for rung, file in files.items():
        frozen = 0 if fit is None else len(fit.codebook)
        with quantiser.timed("fit"):
            fit = fitter.fit(rung.num_codebooks, rung.num_fine_tokens, inside=fit)
            quantiser.details[f"signs {rung.num_codebooks}"] = fit.details
            head = quantiser.head_of(rung, statistics, fit)
            for smaller in heads.values():
                head.hold(smaller)
        if distill_steps:
            with quantiser.timed("distillation"):
                quantiser.distill(
                    head,
                    distill_steps,
                    statistics,
                    frozen_bits=frozen,
                    state_file=file,
                    keep_state=True,
                    name="distillation" if rung == size else f"distillation {rung.num_codebooks}",
                )
            fit = _fit_of(head)
        heads[rung] = head
    for file in files.values():
        if file is not None:
            file.unlink(missing_ok=True)
    return heads


def _state_file_of(size: HeadSize, state_file: Path | None) -> Path | None:
    if state_file is None:
        return None
    return state_file.with_name(f"{state_file.name}.{size.num_codebooks}")


def _fit_of(head: VQLogitsHead) -> SignFit:
    """What a head has become, as a fit of raw hidden states."""
    return SignFit(
        head.codes,
        head.score_scale * head.codebook.detach(),
        head.score_scale * head.codebook_bias.detach(),
        head.fine_ids,
        head.fine_codes,
    )
