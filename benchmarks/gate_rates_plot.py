"""The plot of parameter errors against sample size, a panel a setting."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .log_log import describe

MARKERS = "osD^vP*X<>hp"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the rows of `benchmarks.gate_rates` to a file.

    Points are medians over the repetitions, bands their 95% confidence intervals, lines the fits
    whose slopes the legend gives.
    """
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    columns = min(2, len(settings))
    lines = -(-len(settings) // columns)
    figure = Figure(figsize=(8 * columns, 7 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for panel, setting in zip(panels, settings, strict=False):
        for index, row in enumerate(row for row in rows if row["setting"] == setting):
            _curve(panel, row, index)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(setting)
        panel.set_xlabel("observations n")
        panel.set_ylabel("median error")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


def _curve(panel: Any, row: Mapping[str, Any], index: int) -> None:
    points, slope, color = row["points"], row["slopes"]["median"], f"C{index % 10}"
    sizes = np.array([point["n"] for point in points], float)
    centres, low, high = (
        np.array([point["median"][end] for point in points]) for end in ("value", "low", "high")
    )
    label = row["quantity"] if slope is None else f"{row['quantity']}: {describe(slope)}"
    marker = MARKERS[index % len(MARKERS)]
    panel.plot(sizes, centres, marker, color=color, label=label, markersize=5)
    panel.fill_between(sizes, low, high, color=color, alpha=0.2, linewidth=0)
    if slope is not None:
        level = np.log(centres).mean() - slope["value"] * np.log(sizes).mean()
        panel.plot(sizes, np.exp(level) * sizes ** slope["value"], color=color, linewidth=0.9)
