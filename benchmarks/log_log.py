"""Slopes of errors against sample sizes on logarithmic axes, with bands from the repetitions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
STATISTICS: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}

Errors = Mapping[int, Sequence[float | None]]


def summarise(errors: Errors, *, seed: int = 0) -> dict[str, Any]:
    """Mean and median error at every sample size, and slopes of their logs over log size.

    Bands are percentiles of bootstrap samples: repetitions are drawn again with replacement, within
    each sample size, as often as there are. Means of a few repetitions are ruled by the worst of
    them where a fit may fail altogether; medians are not.

    Args:
        errors: sample size -> one error a repetition; None or NaN where there is none.
        seed: of the resampling.

    Returns:
        `points`: for each size `n`, `repetitions`, `mean` and `median`, the last two with `value`,
        `low`, `high`. `slopes`: likewise for `mean`, `median`, and, of the upper half of the sizes,
        `mean_large_n` and `median_large_n`; None with fewer than two sizes.
    """
    draw = np.random.default_rng(seed)
    values = {n: np.array([e for e in errors[n] if e is not None], float) for n in sorted(errors)}
    values = {n: found[np.isfinite(found)] for n, found in values.items()}
    values = {n: found for n, found in values.items() if len(found)}
    resampled = {n: draw.choice(v, (RESAMPLES, len(v))) for n, v in values.items()}
    points: list[dict[str, Any]] = [
        {"n": n, "repetitions": len(found)} for n, found in values.items()
    ]
    slopes = {}
    for name, statistic in STATISTICS.items():
        centres = {n: float(statistic(found)) for n, found in values.items()}
        drawn = {n: statistic(found, axis=1) for n, found in resampled.items()}
        for point in points:
            n = point["n"]
            point[name] = {"value": centres[n], **_band(drawn[n])}
        sizes = [n for n in values if drawn[n].min() > 0]
        slopes[name] = _slope(centres, drawn, sizes)
        slopes[f"{name}_large_n"] = _slope(centres, drawn, sizes[len(sizes) // 2 :])
    return {"points": points, "slopes": slopes}


def describe(slope: Mapping[str, float] | None) -> str:
    """A slope with its band, for tables."""
    if slope is None:
        return "-"
    return f"{slope['value']:.3f} ({slope['low']:.3f}, {slope['high']:.3f})"


def _slope(
    centres: Mapping[int, float], drawn: Mapping[int, NDArray[Any]], sizes: Sequence[int]
) -> dict[str, float] | None:
    if len(sizes) < 2:
        return None
    logs = np.log(sizes)
    value = np.polyfit(logs, np.log([centres[n] for n in sizes]), 1)[0]
    slopes = np.polyfit(logs, np.log([drawn[n] for n in sizes]), 1)[0]
    return {"value": float(value), **_band(slopes)}


def _band(values: NDArray[Any]) -> dict[str, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high)}
