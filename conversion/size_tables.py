"""Sizes that a conversion compared, one row each, for terminal and model card."""

from dataclasses import dataclass

from .wording import megabytes, milliseconds


@dataclass
class LadderRung:
    """One size of the ladder. Perplexities are on the evaluation text."""

    param_reduction: float
    bits_per_token: float
    bits_per_weight: float
    bytes: int
    perplexity: float
    perplexity_factor: float
    greedy_agreement: float
    logit_seconds: float


@dataclass
class NestedRung(LadderRung):
    """One size of a checkpoint that holds several; `bytes` are those of its layer once loaded.

    Attributes:
        num_codebooks: R, by which it is loaded.
    """

    num_codebooks: int


@dataclass
class Candidate:
    """A size that a search tried. Factors are of the perplexity of the evaluation text.

    Attributes:
        num_codebooks: R.
        bits_per_token: mean length of a token's code.
        param_reduction: as in the report.
        fit_factor: by the fit alone.
        factor: of the head as it would be written, after the distillation where there is one; None
            where the fit alone told enough.
        greedy_agreement: share of the evaluation text on which the head of that factor, or by the
            fit where there is none, has the dense layer's most likely token.
        passed: whether the factor is within the limit.
        chosen: the smallest that passed.
    """

    num_codebooks: int
    bits_per_token: float
    param_reduction: float
    fit_factor: float
    factor: float | None
    greedy_agreement: float
    passed: bool | None
    chosen: bool


LADDER_COLUMNS = (
    "saved",
    "bits a token",
    "bits a weight",
    "bytes",
    "perplexity",
    "factor",
    "same token",
    "one row",
)


def ladder_cells(rung: LadderRung) -> tuple[str, ...]:
    """A rung as text, in the order of `LADDER_COLUMNS`."""
    return (
        f"{rung.param_reduction:.1%}",
        f"{rung.bits_per_token:,.0f}",
        f"{rung.bits_per_weight:.2f}",
        megabytes(rung.bytes),
        f"{rung.perplexity:.2f}",
        f"x{rung.perplexity_factor:.3f}",
        f"{rung.greedy_agreement:.1%}",
        milliseconds(rung.logit_seconds),
    )


NESTED_COLUMNS = (
    "R",
    "saved",
    "bits a token",
    "bytes loaded",
    "perplexity",
    "factor",
    "same token",
    "one row",
)


def nested_cells(rung: NestedRung) -> tuple[str, ...]:
    """A size as text, in the order of `NESTED_COLUMNS`."""
    saved, bits, _, size, *judged = ladder_cells(rung)
    return (f"{rung.num_codebooks:,}", saved, bits, size, *judged)


CANDIDATE_COLUMNS = (
    "R",
    "bits a token",
    "saved",
    "factor, fit alone",
    "factor",
    "same token",
    "passed",
)


def candidate_cells(candidate: Candidate) -> tuple[str, ...]:
    """A candidate as text, in the order of `CANDIDATE_COLUMNS`."""
    passed = {None: "", True: "yes", False: "no"}[candidate.passed]
    return (
        f"{candidate.num_codebooks:,}",
        f"{candidate.bits_per_token:,.0f}",
        f"{candidate.param_reduction:.1%}",
        f"x{candidate.fit_factor:.4f}",
        "" if candidate.factor is None else f"x{candidate.factor:.4f}",
        f"{candidate.greedy_agreement:.1%}",
        "chosen" if candidate.chosen else passed,
    )
