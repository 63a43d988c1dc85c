"""A finished head split into a mixture of softmaxes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.gates import LINEAR, check_activation, check_temperature
from hf_vqlogits.mixture import split

from .calibration import CalibrationStatistics
from .distillation_state import MIXTURE
from .errors import ConversionError
from .quantise import Quantiser
from .sizes import HeadSize


def check_mixture(
    num_mixtures: int,
    gate_activation: str,
    gate_temperature: float,
    *,
    nested: Sequence[float] | None,
    refine_top_k: int,
    max_perplexity_increase: float | None,
) -> None:
    """Check the options of a mixture.

    Raises:
        ConversionError: one is out of its range, or goes with no mixture, or not with one.
    """
    if num_mixtures < 1:
        raise ConversionError(f"`num_mixtures` must be at least 1, got {num_mixtures}.")
    try:
        check_activation(gate_activation, "gate_activation")
        check_temperature(gate_temperature, "gate_temperature")
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if num_mixtures == 1:
        for name, value, default in (
            ("gate_activation", gate_activation, LINEAR),
            ("gate_temperature", gate_temperature, 1.0),
        ):
            if value != default:
                raise ConversionError(
                    f"`{name}` {value!r} is of a mixture's gate; give `num_mixtures`, 2 for "
                    "example."
                )
        return
    others = {
        "nested": nested,
        "refine_top_k": refine_top_k,
        "max_perplexity_increase": max_perplexity_increase,  # judged before the split
    }
    for name, given in others.items():
        if given:
            raise ConversionError(
                f"`num_mixtures` {num_mixtures} does not go with `{name}` {given}; leave one of "
                "them out."
            )


def mix(
    quantiser: Quantiser,
    head: VQLogitsHead,
    size: HeadSize,
    statistics: CalibrationStatistics,
    *,
    distill_steps: int,
    state_file: Path | None = None,
    **gate: Any,
) -> VQLogitsHead:
    """Split a head and distil the mixture, whose codes stay.

    Args:
        quantiser: of the model.
        head: the finished plain head.
        size: of it.
        statistics: of the calibration text.
        distill_steps: of about a thousand positions each; 0 leaves the components nearly equal.
        state_file: where an interrupted distillation is kept.
        **gate: `num_mixtures`, `gate_activation` and `gate_temperature`.
    """
    with quantiser.timed(MIXTURE):
        mixture = split(head, quantiser.config(size, **gate), quantiser.seed)
        if distill_steps:
            options: dict[str, Any] = {"state_file": state_file, "name": MIXTURE}
            quantiser.distill(mixture, distill_steps, statistics, learn_codes=False, **options)
    return mixture
