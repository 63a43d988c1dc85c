"""The model card of a converted model, and its plot."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from .report import ConversionReport
from .size_tables import (
    CANDIDATE_COLUMNS,
    LADDER_COLUMNS,
    NESTED_COLUMNS,
    LadderRung,
    candidate_cells,
    ladder_cells,
    nested_cells,
)

PLOT_FILE = "vq_report.png"
CARD = """---
{metadata}
---

# {title}

{source} with its dense {replaced} ({codes}). Made by
`convert_to_vq` of the package `hf_vqlogits`, {training}.

```python
import hf_vqlogits  # registers the model type
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
```

{before_after}

![before and after]({plot})

{facts}
{nested}{sizes}{notes}
All figures and the versions behind them are in `vq_report.json`.
"""
NESTED = """
The output layer holds smaller ones, of fewer bits a token R. One of them is loaded by

```python
model = {call}
```

and saves as a checkpoint of its own.

{table}
"""


def model_card(report: ConversionReport) -> str:
    """The card as Markdown."""
    sizes = ""
    if report.ladder:
        cells = [ladder_cells(rung) for rung in report.ladder]
        sizes = f"\nSizes that were compared:\n\n{_table(LADDER_COLUMNS, cells)}\n"
    if report.candidates:
        cells = [candidate_cells(candidate) for candidate in report.candidates]
        table = _table(CANDIDATE_COLUMNS, cells)
        sizes += f"\n{report.search_title.capitalize()}:\n\n{table}\n"
    nested = ""
    if report.nested:
        cells = [nested_cells(rung) for rung in report.nested]
        nested = NESTED.format(call=report.loading_of_a_size(), table=_table(NESTED_COLUMNS, cells))
    notes = "".join(f"- {note}\n" for note in report.notes)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=report.base_model,
        tags=["vq-logits", "vector-quantisation"],
    )
    training = "without training"
    if report.distillation is not None:
        training = f"with the output layer alone trained by distillation ({report.distillation})"
    if report.end_to_end is not None:
        training = (
            "with output layer and input embedding trained by end-to-end distillation "
            f"({report.end_to_end})"
        )
    if report.whole_model is not None:
        training = (
            "with the whole model, its body too, trained by distillation from the original "
            f"({report.whole_model})"
        )
    replaced = "output layer replaced by a vector-quantised one"
    if report.embeddings != "keep":
        replaced = "output layer and input embedding replaced by vector-quantised ones"
    return CARD.format(
        replaced=replaced,
        metadata=metadata.to_yaml(),
        source=report.source,
        training=training,
        title=report.name,
        codes=dict(report.facts())["method, codes"],
        before_after=_table(("", "before", "after"), report.rows()),
        plot=PLOT_FILE,
        facts="".join(f"- {name}: {value}\n" for name, value in report.facts()),
        nested=nested,
        sizes=sizes,
        notes=f"\nNotes:\n\n{notes}" if notes else "",
    )


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
    return "\n".join(lines)


def plot(report: ConversionReport, path: Path) -> None:
    """Draw the before/after bars, and the curve over sizes where there are several.

    Args:
        report: of a conversion.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    bars: list[tuple[str, float, float]] = [
        ("output layer, MB", report.head_before["bytes"] / 1e6, report.head_after["bytes"] / 1e6)
    ]
    if report.embeddings != "keep":
        size = report.model_bytes
        bars.append(("whole model, MB", size["before"] / 1e6, size["after"] / 1e6))
    if report.logit_seconds:
        times = report.logit_seconds
        bars.append(
            ("logits of one row, ms", times["dense_float32"] * 1e3, times["quantised"] * 1e3)
        )
    if report.perplexity is not None:
        bars.append(("perplexity", report.perplexity["before"], report.perplexity["after"]))
    rungs: list[LadderRung] = [*report.ladder, *report.nested]
    panels = len(bars) + bool(rungs)
    figure = Figure(figsize=(3.2 * panels, 3.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, (name, before, after) in zip(axes, bars, strict=False):
        drawn = axis.bar(["dense", "VQ-Logits"], [before, after], color=["#9aa5b1", "#2b6cb0"])
        axis.bar_label(drawn, fmt="{:.3g}", padding=2)
        axis.set_title(name, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    if rungs:
        _plot_rungs(axes[-1], rungs)
    figure.suptitle(f"{report.source}, {report.bits_per_token:,.0f} bits a token", fontsize=11)
    figure.savefig(path, dpi=120)


def _plot_rungs(axis, rungs: list[LadderRung]) -> None:
    rungs = sorted(rungs, key=lambda rung: rung.bytes)
    megabytes = [rung.bytes / 1e6 for rung in rungs]
    factors = [rung.perplexity_factor for rung in rungs]
    axis.plot(megabytes, factors, "o-", color="#2b6cb0")
    for x, y, rung in zip(megabytes, factors, rungs, strict=True):
        axis.annotate(
            f"{rung.param_reduction:.1%}", (x, y), textcoords="offset points", xytext=(5, 4)
        )
    axis.axhline(1.0, color="#9aa5b1", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("output layer, MB")
    axis.set_title("perplexity factor", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
