"""The plot of the ablation: a panel for each section."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .factor_axis import FLOOR, factor_axis, height

Row = Mapping[str, Any]
NAMES = {
    None: "dense",
    "random": "random, G = 1",
    "contiguous": "contiguous, G = 1",
    "frequency": "frequency, G = 1",
    "kmeans": "k-means, G = 1",
    "residual": "residual",
    "signs": "signs",
}
TRAININGS = {"none": "fitted", "head": "output layer trained", "all": "whole model trained"}
MAPPINGS = {
    "no": "fitted",
    "codebook": "distilled, codes fixed",
    "codes": "distilled, codes learnt",
}
SHADES = {"none": "C0", "head": "C1", "all": "C2", "no": "C0", "codebook": "C1", "codes": "C2"}
PERPLEXITIES = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
FACTOR = "perplexity over the dense model's"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of `benchmarks.ablation` to a file."""
    figure = Figure(figsize=(15, 11), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2).flat
    draw = {
        "size": _sizes,
        "initialisation": _starts,
        "mapping": _mapping,
        "training": _trainings,
    }
    for panel, (section, how) in zip(panels, draw.items(), strict=True):
        how(panel, [row for row in rows if section in row["sections"]])
        panel.set_title(section, fontweight="bold")
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def _sizes(panel: Any, rows: Sequence[Row]) -> None:
    for method, marker in (("kmeans", "s"), ("signs", "o")):
        for trained, line in (("none", ":"), ("all", "-")):
            some = [r for r in rows if (r["method"], r["trained"]) == (method, trained)]
            points = sorted((_codewords(row), height(row["factor"])) for row in some)
            label = f"{NAMES[method]}, {TRAININGS[trained]}"
            color = SHADES[trained]
            panel.plot(*_columns(points), marker=marker, linestyle=line, color=color, label=label)
    # Below the dense model's perplexity the bound forbids nothing that matters.
    binding = [row for row in rows if row["trained"] == "none" and _bound(row) > 1]
    bounds = sorted((_codewords(row), height(_bound(row))) for row in binding)
    label = "bound of k-means, G = 1, over the dense model"
    panel.plot(*_columns(bounds), color="black", linestyle="--", linewidth=1, label=label)
    panel.set_xscale("log")
    factor_axis(panel)
    ticks = sorted({_codewords(row) for row in rows})
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    panel.set_xlabel("codewords: K of one codebook, R of sign codes")
    panel.set_ylabel(FACTOR)


def _starts(panel: Any, rows: Sequence[Row]) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    methods.sort(key=list(NAMES).index)
    _bars(panel, rows, methods, "method", "trained", TRAININGS)
    for row in rows:
        if row["trained"] == "none" and _bound(row) > 1:
            at = methods.index(row["method"])
            bound = height(_bound(row))
            panel.hlines(bound, at - 0.42, at + 0.42, color="black", linestyle="--", linewidth=1)
    panel.plot([], [], color="black", linestyle="--", linewidth=1, label="bound of G = 1")
    panel.set_xticks(range(len(methods)), [NAMES[m].replace(", ", ",\n") for m in methods])
    panel.set_ylabel(FACTOR)


def _mapping(panel: Any, rows: Sequence[Row]) -> None:
    heads = sorted({_head(row) for row in rows}, key=lambda head: (head[0] != "signs", head[1]))
    named = [{**row, "at": _head(row)} for row in rows]
    _bars(panel, named, heads, "at", "distilled", MAPPINGS)
    labels = [f"signs,\nR = {n:,}" if m == "signs" else f"k-means,\nK = {n:,}" for m, n in heads]
    panel.set_xticks(range(len(heads)), labels)
    panel.set_ylabel(FACTOR)


def _trainings(panel: Any, rows: Sequence[Row]) -> None:
    methods = sorted({row["method"] for row in rows}, key=list(NAMES).index)
    width = 0.8 / len(TRAININGS)
    for index, (trained, label) in enumerate(TRAININGS.items()):
        some = [row for method in methods for row in rows if _is(row, method, trained)]
        at = [methods.index(row["method"]) + (index - 1) * width for row in some]
        heights = [_perplexity(row) for row in some]
        label = "as it is, or fitted" if trained == "none" else label
        bars = panel.bar(at, heights, 0.95 * width, color=SHADES[trained], label=label)
        panel.bar_label(bars, fmt="%.1f", fontsize="small")
    panel.set_yscale("log")
    panel.set_yticks(PERPLEXITIES, [f"{tick:,}" for tick in PERPLEXITIES])
    panel.minorticks_off()
    shown = [_perplexity(row) for row in rows]
    panel.set_ylim(min(shown) / 1.3, 1.5 * max(shown))
    panel.set_xticks(range(len(methods)), [NAMES[method] for method in methods])
    panel.set_ylabel("perplexity")


def _bars(
    panel: Any,
    rows: Sequence[Row],
    groups: Sequence[Any],
    group_field: str,
    bar_field: str,
    bars: Mapping[str, str],
) -> None:
    """Factors as bars: a group for each value of one field, a bar in it for each of another."""
    width = 0.8 / len(bars)
    low = height(FLOOR)
    for index, (value, label) in enumerate(bars.items()):
        some = [row for row in rows if row[bar_field] == value]
        at = [
            groups.index(row[group_field]) + (index - (len(bars) - 1) / 2) * width for row in some
        ]
        lengths = [height(row["factor"]) - low for row in some]
        drawn = panel.bar(at, lengths, 0.95 * width, bottom=low, color=SHADES[value], label=label)
        told = [f"{row['factor']:.5g}" for row in some]
        panel.bar_label(drawn, told, fontsize="x-small", padding=2, rotation=90)
    factor_axis(panel)
    top = max((height(row["factor"]) for row in rows), default=1.0)
    panel.set_ylim(low, 4 * top)  # room for the figures above the bars


def _columns(points: Sequence[tuple[float, float]]) -> list[list[float]]:
    return [[point[axis] for point in points] for axis in (0, 1)]


def _codewords(row: Row) -> int:
    count: int = row["num_codebooks"] if row["code_type"] == "sign" else row["codebook_size"]
    return count


def _head(row: Row) -> tuple[str, int]:
    return row["method"], _codewords(row)


def _is(row: Row, method: str | None, trained: str) -> bool:
    return row["method"] == method and row["trained"] == trained


def _bound(row: Row) -> float:
    """The bound over the dense model's perplexity, geometric mean of the texts; 0 without one."""
    product = 1.0
    for text, bound in row.get("perplexity_bound", {}).items():
        product *= bound / row["texts"][text]["dense_perplexity"]
    return product ** (1 / len(row["texts"])) if "perplexity_bound" in row else 0.0


def _perplexity(row: Row) -> float:
    """Geometric mean over the texts."""
    product = 1.0
    for text in row["texts"].values():
        product *= text["perplexity"]
    return float(product ** (1 / len(row["texts"])))
