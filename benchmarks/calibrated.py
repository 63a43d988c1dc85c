"""The statistics of a case's calibration text, kept in a work folder: they take the longest.

The text as it was read, with what was drawn anew, is kept with them: a training after an interrupt
reads the same.
"""

from typing import Any

from hf_vqlogits.conversion.calibration import CalibrationStatistics
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.streaming import KeptStates

from .protocol import Case
from .work_folder import WorkFolder


def calibrated(
    case: Case, quantiser: Quantiser, work: WorkFolder, *, name: str = "calibration"
) -> tuple[CalibrationStatistics, dict[str, Any]]:
    """The statistics, and what a row tells of them.

    Args:
        case: a model with its texts.
        quantiser: of the case; it takes the hidden states of the text.
        work: the folder, of one seed and amount of text.
        name: under which they are kept there, of this text of the case.
    """

    def make() -> dict[str, Any]:
        with quantiser.timed("calibration"):
            statistics = quantiser.calibrate(to_distill=True)
        assert quantiser.states is not None
        return {
            "statistics": vars(statistics),
            "blocks": quantiser.states.blocks,
            "seconds": quantiser.seconds["calibration"],
        }

    kept = work.tensors(f"{case.name}-{name}", make)
    if quantiser.states is None:
        versions = 1 + quantiser.rereadings
        quantiser.states = KeptStates(case.parts.backbone, kept["blocks"], versions=versions)
    told = {
        "calibration_seconds": kept["seconds"],
        "calibration_tokens": quantiser.corpus.calibration.numel(),
    }
    return CalibrationStatistics(**kept["statistics"]), told
