"""The plot of `benchmarks.speed`: how the time of the logits grows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

LABELS = {
    "vocab_size": "vocabulary V",
    "rows": "rows N",
    "bits": "bits a token R",
    "threads": "threads",
}
LINES = {
    "quantised": ("VQ-Logits", "#2b6cb0", "o-"),
    "dense_bfloat16": ("dense bfloat16", "#4a5568", "s-"),
    "dense_float32": ("dense float32", "#9aa5b1", "^-"),
}


def plot(scaling: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw a panel for each axis: milliseconds of a call after other memory was read, both log.

    Args:
        scaling: rows of figures by the axis along which they differ.
        path: PNG file to write.
    """
    figure = Figure(figsize=(3.6 * len(scaling), 3.4), layout="constrained")
    axes = figure.subplots(1, len(scaling), squeeze=False)[0]
    for panel, (axis, rows) in zip(axes, scaling.items(), strict=True):
        places = [row[axis] for row in rows]
        for name, (label, color, style) in LINES.items():
            times = [row["cold"]["milliseconds"][name] for row in rows]
            panel.plot(places, times, style, color=color, markersize=4, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(LABELS[axis])
        panel.grid(color="#e2e8f0", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("logits, ms, cold")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
