"""The plot of ROC curves, a panel for the whole and one for few false alarms."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FEW = 0.1  # of false alarms, what the second panel shows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw rows of `benchmarks.gru_svm` to a file; bands go from the least to the greatest seed."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    whole, few = figure.subplots(1, 2)
    for panel in (whole, few):
        for index, row in enumerate(rows):
            curve = row["roc"]
            rates = curve["false_positive_rate"]
            panel.fill_between(
                rates, curve["least"], curve["most"], alpha=0.15, color=f"C{index}", linewidth=0
            )
            panel.plot(
                rates,
                curve["mean"],
                color=f"C{index}",
                linestyle="-" if row["network"] else "--",
                label=f"{row['name']}: AUC {row['auc']['mean']:.3f}",
            )
        panel.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
        panel.grid(alpha=0.3)
        panel.set_xlabel("normal records taken for attacks")
        panel.set_ylim(0, 1)
    whole.set_xlim(0, 1)
    few.set_xlim(0, FEW)
    whole.set_ylabel("attacks found")
    whole.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=110)
