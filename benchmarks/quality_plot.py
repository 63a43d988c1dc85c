"""The plot of perplexity factor against bytes, a panel a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .factor_axis import factor_axis, height
from .peers.catalogue import FAMILIES, OURS

MARKERS = "osD^vP*X<>hpd8H"
SIZES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # MB


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the rows of `benchmarks.quality` to a file; ours is a line, peers are markers."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(8 * len(models) + 3, 7), layout="constrained")
    FigureCanvasAgg(figure)
    peers = {row["peer"] for row in rows}  # one legend for all panels
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for panel, model in zip(panels, models, strict=True):
        _panel(panel, [row for row in rows if row["model"] == model], peers)
        panel.set_title(model)
    panels[0].set_ylabel("perplexity factor over the dense layer, without training")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def _colour(index: int) -> Any:
    """Ten colours, then a light one of each."""
    light, hue = divmod(index, 10)
    return colormaps["tab20"](2 * hue + light)


def _panel(panel: Any, rows: Sequence[Mapping[str, Any]], peers: set[str]) -> None:
    for index, peer in enumerate(FAMILIES):
        if peer not in peers:
            continue
        points = sorted(
            (row["bytes"] / 1e6, height(row["factor"]))
            for row in rows
            if row["peer"] == peer and "float32 codewords" not in row["setting"]
        )
        ours = peer == OURS
        panel.plot(
            *zip(*points, strict=True) if points else ((), ()),
            marker=MARKERS[index],
            linestyle="-" if ours else ":",
            linewidth=2.5 if ours else 0.8,
            markersize=9 if ours else 7,
            color="black" if ours else _colour(index),
            label=peer,
            zorder=3 if ours else 2,
        )
    panel.set_xscale("log")
    panel.set_xticks(SIZES, [f"{size:g}" for size in SIZES])
    factor_axis(panel)
    panel.grid(alpha=0.3)
    panel.set_xlabel("bytes of the output layer, MB")
