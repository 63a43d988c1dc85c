"""The statistics of a case's calibration text, kept in a work folder: they take the longest."""

from typing import Any

from hf_vqlogits.conversion.calibration import CalibrationStatistics
from hf_vqlogits.conversion.quantise import Quantiser

from .protocol import Case
from .work_folder import WorkFolder


def calibrated(
    case: Case, quantiser: Quantiser, work: WorkFolder, *, name: str = "calibration"
) -> tuple[CalibrationStatistics, dict[str, Any]]:
    """The statistics, and what a row tells of them.

    Args:
        case: a model with its texts.
        quantiser: of the case.
        work: the folder, of one seed and amount of text.
        name: under which they are kept there, of this text of the case.
    """

    def make() -> dict[str, Any]:
        with quantiser.timed("calibration"):
            statistics = quantiser.calibrate()
        return {"statistics": vars(statistics), "seconds": quantiser.seconds["calibration"]}

    kept = work.tensors(f"{case.name}-{name}", make)
    told = {
        "calibration_seconds": kept["seconds"],
        "calibration_tokens": quantiser.corpus.calibration.numel(),
    }
    return CalibrationStatistics(**kept["statistics"]), told
