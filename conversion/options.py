"""The options of a conversion: their defaults, and which of them go together.

What a size or a text says of its own stands in `sizes.py` and `corpus.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vqlogits.configuration_vqlogits import EMBEDDINGS

from .corpus import Corpus
from .errors import ConversionError
from .held_out import check_length, long_enough

LAST_SEED = 2**31 - 1  # the largest that every library here takes
DISTILL_STEPS = 256  # five to eight minutes for SmolLM2-135M on two cores, by its size
INPUT_DISTILL_STEPS = 128  # likewise
REFINE_AGREEMENT = 0.999


def check_options(
    embeddings: str,
    embedding_bits: int | None,
    ladder: bool,
    method: str,
    folder: Path | None,
    push_to_hub: str | None,
) -> None:
    """Check what goes with which input embedding, and what needs an output folder.

    Raises:
        ConversionError: names the option, its value and what to do.
    """
    if embeddings not in EMBEDDINGS:
        raise ConversionError(
            f"`embeddings` must be one of {', '.join(EMBEDDINGS)}; got {embeddings!r}."
        )
    if embeddings == "tied" and method != "signs":
        raise ConversionError(
            f"`embeddings` 'tied' needs sign codes, but `method` is {method!r}; use 'vq' or 'keep'."
        )
    if embedding_bits is not None and embeddings != "vq":
        raise ConversionError(
            f"`embedding_bits` applies to `embeddings` 'vq' only, not to {embeddings!r}."
        )
    if embedding_bits is not None:
        check_range("embedding_bits", embedding_bits, 1)
    if ladder and embeddings != "keep":
        raise ConversionError(
            f"`ladder` compares output layers alone, and `embeddings` {embeddings!r} changes more; "
            "compare with 'keep', then convert with the size chosen."
        )
    if ladder and method != "signs":
        raise ConversionError(f"`ladder` compares sign codes; it does not apply to {method!r}.")
    if push_to_hub is not None and folder is None:
        raise ConversionError("`push_to_hub` uploads the output folder; give `output` as well.")


def check_range(name: str, value: int, least: int, most: int | None = None) -> None:
    """Check that a number is not too small, nor too large.

    Raises:
        ConversionError: a number is too small or too large.
    """
    if value < least:
        raise ConversionError(f"`{name}` must be at least {least}, got {value}.")
    if most is not None and value > most:
        raise ConversionError(f"`{name}` must be at most {most}, got {value}.")


def distillation_steps(option: str, asked: int | None, method: str, corpus: Corpus) -> int:
    """Steps of a distillation, those asked for or the default; before the hours that precede it.

    Raises:
        ConversionError: there is too little text for the steps asked for.
    """
    if asked is not None:
        if asked:
            check_length(corpus.calibration, option)
        return asked
    if method != "signs":
        return 0  # gradients of index codes are slow
    if not long_enough(corpus.calibration):
        note = "too little calibration text for a distillation: fitted only"
        if note not in corpus.notes:
            corpus.notes.append(note)
        return 0
    return {"distill_steps": DISTILL_STEPS, "input_distill_steps": INPUT_DISTILL_STEPS}[option]


def check_input_steps(asked: int | None, embeddings: str) -> int | None:
    """Check the steps of an end-to-end distillation; 0 where there is nothing to be trained by it.

    Raises:
        ConversionError: names the option, its value and what to do.
    """
    if asked is not None:
        check_range("input_distill_steps", asked, 0)
    if embeddings != "keep":
        return asked
    if asked:
        raise ConversionError(
            f"`input_distill_steps` {asked} trains a quantised input embedding, but `embeddings` "
            "is 'keep'; use 'vq' or 'tied', or leave it out."
        )
    return 0


def check_body_steps(steps: int, **others: Any) -> None:
    """Check the steps of a whole-model distillation; `others` are options that it rules out.

    Raises:
        ConversionError: names the option, its value and what to do.
    """
    check_range("body_distill_steps", steps, 0)
    for name, given in others.items():
        if steps and given:
            raise ConversionError(
                f"`body_distill_steps` {steps} does not go with `{name}` {given}, which knows the "
                "original body only; leave one of them out."
            )


def check_refinement(
    refine_top_k: int, refine_agreement: float, nested: Sequence[float] | None
) -> None:
    """Check the options of a refinement.

    Raises:
        ConversionError: names the option, its value and what to do.
    """
    check_range("refine_top_k", refine_top_k, 0)
    if not 0 < refine_agreement <= 1:
        raise ConversionError(
            f"`refine_agreement` must lie above 0 and be at most 1, got {refine_agreement}."
        )
    if refine_top_k and nested is not None:
        raise ConversionError(
            f"`refine_top_k` {refine_top_k} does not go with `nested`: the errors of the logits "
            "are kept for one size only. Convert to one size."
        )
    if not refine_top_k and refine_agreement != REFINE_AGREEMENT:
        raise ConversionError(
            f"`refine_agreement` {refine_agreement} needs `refine_top_k`; give it, 64 for example."
        )
