"""Tables of what is aimed at and reached, and of how far fits are from what codes can do."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .markdown import is_there, precise, results, table

FIT, DISTILLED = "fit alone", "and head-only distillation"
TUNED, TIED = "and fine-tuned, against dense", "input and output tied, fine-tuned, against dense"


@dataclass(frozen=True)
class Target:
    """A perplexity factor that a head of a model shall not exceed.

    Attributes:
        model: as in the results.
        kept: share of the output layer's parameters.
        step: what is done for it.
        factor: the target.
        minutes: on two cores, calibration included; None without such a target.
    """

    model: str
    kept: float
    step: str
    factor: float
    minutes: int | None = None


TARGETS = (
    *(
        Target("smollm2", kept, step, factor, minutes)
        for step, minutes, factors in (
            (FIT, 10, (1.22, 1.055, 1.007)),
            (DISTILLED, 30, (1.12, 1.03, 1.004)),
            (TUNED, None, (1.04, 1.01, 1.005)),
        )
        for kept, factor in zip((0.01, 0.02, 0.04), factors, strict=True)
    ),
    Target("smollm2", 0.02, TIED, 1.05),
    Target("smollm2", 0.04, TIED, 1.02),
    Target("gpt2-novels", 0.01, FIT, 1.01),
    Target("gpt2-novels", 0.01, DISTILLED, 1.005),
)


def targets() -> str:
    """Every target, what was reached, and whether that is it."""

    def cells(target: Target) -> Iterable[str]:
        row = _tuned(target) if target.step in (TUNED, TIED) else _fitted(target)
        yield target.model
        yield f"{1 - target.kept:.0%}"
        yield target.step
        limit = "" if target.minutes is None else f", {target.minutes} minutes"
        yield f"x{target.factor:g}{limit}"
        if row is None:
            yield from ("not measured", "")
            return
        factor, minutes = row
        yield precise(factor) + ("" if minutes is None else f", {minutes:.0f} minutes")
        met = {"perplexity": factor <= target.factor}
        if target.minutes is not None and minutes is not None:
            met["time"] = minutes <= target.minutes
        missed = [name for name, reached in met.items() if not reached]
        yield f"**missed**: {' and '.join(missed)}" if missed else "met"

    return table("model | saved | step | target | reached |  ", map(cells, TARGETS))


def _fitted(target: Target) -> tuple[float, float] | None:
    """Factor and minutes of a head by the fit, or after its distillation."""
    rows = [row for row in results("quality_fit")["rows"] if row["model"] == target.model]
    by_head = {row["head"]: row for row in rows}
    name = f"signs {1 - target.kept:.1%}"
    fit, row = by_head.get(name), by_head.get(f"{name} distilled")
    if target.step == FIT:
        row = fit
    if fit is None or row is None:
        return None
    seconds = fit["calibration_seconds"] + fit["seconds"]
    seconds += 0 if row is fit else row["seconds"]
    return row["factor"], seconds / 60


def _tuned(target: Target) -> tuple[float, None] | None:
    """Mean factor of the best row of this size, whether the whole model was distilled or not."""
    if not is_there("finetuned"):
        return None
    embeddings = "tied" if target.step == TIED else "keep"
    found = [
        row["factor"]["mean"]
        for row in results("finetuned")["rows"]
        if (row["method"], row["embeddings"]) == ("signs", embeddings)
        and abs(row["reduction"] - (1 - target.kept)) < 1e-9
    ]
    return (min(found), None) if found else None


def bounds() -> str:
    """Errors of the fits over the rate-distortion bounds; nothing where they are not measured."""
    if not is_there("quality"):
        return ""
    rows = [row for row in results("quality")["rows"] if row.get("rate_distortion")]
    rows = [row for row in rows if "float32" not in row["setting"]]

    def cells(row: Mapping[str, Any]) -> Iterable[str]:
        bound = row["rate_distortion"]
        bits = row["details"]["bits_per_token"]
        yield row["model"]
        yield row["setting"]
        yield f"{bits:,.0f}"
        yield _ratio(bound["error_over_fixed_bound"])
        yield f"{bound['fixed_bits_at_error'] / bits:.2f}"
        yield _ratio(bound["error_over_spread_bound"])
        yield f"{bound['spread_bits_at_error'] / bits:.2f}"
        yield precise(row["factor"])

    header = (
        "model | parameters | bits a token | as many bits for every token: error over the bound | "
        "share of the bits that would do | bits shared out: error over the bound | "
        "share of the bits that would do | perplexity factor"
    )
    return table(header, map(cells, rows))


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
