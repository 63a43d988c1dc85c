"""Columns of records as numbers between 0 and 1, or standardised; fitted once, on training data.

An encoding is plain data, so that it can be saved as JSON: `{"categories": [...]}`,
`{"edges": [...]}` or `{"mean": m, "deviation": s}`.
"""

import math
from typing import Any

import numpy as np

Encoding = dict[str, Any]


def fit_categories(values: np.ndarray) -> Encoding:
    """Index the categories of a column, in the order of their names.

    Args:
        values: texts (N,).

    Returns:
        `categories`, of which the first has index 1; 0 is for those that are not among them.
    """
    return {"categories": sorted(set(values))}


def fit_quantiles(values: np.ndarray, bins: int) -> Encoding:
    """Cut a column into bins that hold about as many of its values each.

    Quantiles that coincide make one cut, so a column of which most values are equal has fewer bins.
    Its two most different values never fall into one bin: that would make of a column that is
    almost always 1 a constant.

    Args:
        values: numbers (N,).
        bins: how many at most, at least 2; 10 are the paper's deciles.

    Returns:
        `edges`, ascending: a value is in bin b, where b edges are below it. Empty of a constant.
    """
    shares = np.arange(1, bins) / bins
    edges = np.unique(np.quantile(values, shares, method="lower"))
    highest = values.max()
    below = values[values < highest]
    edges = edges[edges < highest]
    if len(below) and not len(edges):
        edges = np.array([below.max()])
    return {"edges": edges.tolist()}


def fit_standardisation(values: np.ndarray) -> Encoding:
    """Mean and standard deviation of a column.

    Args:
        values: numbers (N,).

    Returns:
        `mean` and `deviation`, which is 0 exactly of a constant column.

    Raises:
        ValueError: the numbers are too large for float64 sums.
    """
    if values.min() == values.max():
        return {"mean": float(values[0]), "deviation": 0.0}
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = float(values.mean()), float(values.std())
    if not (math.isfinite(mean) and math.isfinite(deviation)):
        raise ValueError(
            f"the values up to {np.abs(values).max():g} are too large for a mean and deviation; "
            "use quantile bins"
        )
    return {"mean": mean, "deviation": deviation or 1.0}


def is_constant(encoding: Encoding) -> bool:
    """Whether the column had one value in the training data, and so tells nothing."""
    if "categories" in encoding:
        return len(encoding["categories"]) < 2
    if "edges" in encoding:
        return not encoding["edges"]
    return encoding["deviation"] == 0


def encode(values: np.ndarray, encoding: Encoding) -> np.ndarray:
    """A column as numbers.

    Args:
        values: numbers or texts (N,).
        encoding: fitted on training data.

    Returns:
        float32 (N,). Categories: index / number of categories, 0 for an unknown one. Bins: bin /
        number of edges. Else (value - mean) / deviation. A continuous column that was constant in
        the training data gives 0, whatever it holds now.
    """
    if "categories" in encoding:
        index = {name: place for place, name in enumerate(encoding["categories"], 1)}
        found = np.array([index.get(value, 0) for value in values], dtype=np.float64)
        return (found / len(index)).astype(np.float32)
    if is_constant(encoding):
        return np.zeros(len(values), dtype=np.float32)
    if "edges" in encoding:
        edges = np.asarray(encoding["edges"])
        return (np.searchsorted(edges, values, side="left") / len(edges)).astype(np.float32)
    scaled = (values - encoding["mean"]) / encoding["deviation"]
    limit = np.finfo(np.float32).max
    return np.clip(scaled, -limit, limit).astype(np.float32)


def unknown(values: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Which values (N,) of a categorical column are not among the categories, bool (N,)."""
    known = set(encoding["categories"])
    return np.array([value not in known for value in values], dtype=bool)
