"""What scoring the best quantised logits again by dense rows does: the dense layer's own choices.

    python -m benchmarks.refined --work FOLDER --output benchmarks/results/refined.json

For several T (`refine_top_k`) and rules (`refine_agreement`): how often the most likely token is
the dense layer's on text kept out of the fit, how many tokens a position are scored again, at how
many positions a bound on any error makes the token certain, and the time of one row's logits beside
the dense layers, in turns in one run, with what each reads in the caches (`warm`) and after 512 MB
of other memory was read (`cold`). The heads are fitted by the project's protocol, but for the
text that the rule is fitted to, and distilled as by default.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hf_vqlogits.conversion.comparison import Logits
from hf_vqlogits.conversion.held_out import keep_out
from hf_vqlogits.conversion.options import DISTILL_STEPS, REFINE_AGREEMENT
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.refining import FittedRefinement
from hf_vqlogits.conversion.sizes import choose_size

from . import speed_peers as peers
from .calibrated import calibrated
from .models import fit_head
from .protocol import MODELS, Case, load_case
from .record import record, score_of, write
from .speed_tables import times_of
from .warm_cold import TEMPERATURES, Seconds, warm_and_cold
from .work_folder import WorkFolder

RULES = (
    *((top_k, REFINE_AGREEMENT) for top_k in (4, 16, 64, 256)),
    *((top_k, 1.0) for top_k in (64, 128, 256)),
)
NONE = "none"
QUICK_STEPS = 4


def measure(
    case: Case, quantiser: Quantiser, work: WorkFolder, *, reduction: float, distill_steps: int
) -> list[dict[str, Any]]:
    """One row of figures for each of `RULES`, and the first without."""
    statistics, told = calibrated(case, quantiser, work, name="part-of-the-text")
    vocab_size, hidden_size = case.parts.weight.shape
    size = choose_size(
        "signs", vocab_size=vocab_size, hidden_size=hidden_size, param_reduction=reduction
    )
    head = fit_head(quantiser, "signs", size, statistics)
    if distill_steps:
        quantiser.distill(head, distill_steps, statistics)
    fitted: dict[str, FittedRefinement] = {
        f"T = {top_k}, {agreement:.1%}": quantiser.refine(
            head,
            size,
            statistics,
            top_k=top_k,
            agreement=agreement,
            with_embedding=case.parts.tied,
        )
        for top_k, agreement in RULES
        if top_k <= vocab_size
    }
    layers = {name: one.logits(case.parts, head) for name, one in fitted.items()}
    scores = case.judge({NONE: head, **layers})
    seconds = _times(case, {NONE: head, **layers})
    rows = []
    for name in (NONE, *fitted):
        row: dict[str, Any] = {"model": case.name, "reduction": reduction, "scored_again": name}
        row |= told | score_of(scores, name)
        row["milliseconds"] = {key: 1e3 * times[name] for key, times in seconds.items()}
        for dtype in ("float32", "bfloat16"):
            row[f"faster_than_{dtype}"] = {
                key: times[f"dense_{dtype}"] / times[name] for key, times in seconds.items()
            }
        if name != NONE:
            one = fitted[name]
            row["top_k"] = one.refinement.top_k
            row["deviations"] = one.refinement.deviations
            for text, figures in row["texts"].items():
                figures |= vars(one.judge(case.parts, head, case.hidden(text)))
        rows.append(row)
    return rows


@torch.no_grad()
def _times(case: Case, layers: Mapping[str, Logits]) -> Seconds:
    """Of one row's logits, by each of the layers and by the dense one."""
    weight = case.parts.weight
    hidden = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0))
    ours = {name: partial(layer, hidden) for name, layer in layers.items()}
    return warm_and_cold({**ours, **peers.dense(hidden, weight)})


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows."""
    table = Table()
    for column in ("model", "scored again", "factor", "same token", "scored", "certain"):
        table.add_column(column)
    for temperature in TEMPERATURES:
        for column in ("one row, ms", "faster than float32 / bfloat16"):
            table.add_column(f"{column}, {temperature}", justify="right")
    for row in rows:
        texts = row["texts"].values()
        table.add_row(
            f"{row['model']}, {row['reduction']:.0%}",
            row["scored_again"],
            f"x{row['factor']:.4f}",
            " / ".join(f"{text['greedy_agreement']:.2%}" for text in texts),
            " / ".join(f"{text['scored']:.1f}" for text in texts if "scored" in text),
            " / ".join(f"{text['certified']:.1%}" for text in texts if "certified" in text),
            *itertools.chain(*(times_of(row, key) for key in TEMPERATURES)),
        )
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def main() -> None:
    """Measure, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--models", type=Path, default=Path("../shared/models"))
    p.add_argument("--only", choices=MODELS, help="one of the models")
    p.add_argument("--param-reduction", type=float, nargs="+", default=[0.99])
    p.add_argument("--distill-steps", type=int, default=DISTILL_STEPS)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="a twentieth of the text")
    p.add_argument("--work", type=Path, help="folder of the statistics; default none are kept")
    p.add_argument("--output", type=Path, required=True)
    options = p.parse_args()
    steps = min(options.distill_steps, QUICK_STEPS) if options.quick else options.distill_steps
    rows: list[dict[str, Any]] = []
    result = record(
        "refined", quick=options.quick, seed=options.seed, distill_steps=steps, rows=rows
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = {"seed": options.seed, "quick": options.quick}
        try:
            work = WorkFolder(options.work or Path(folder), settings)
        except ValueError as error:
            p.error(str(error))
        for name in [options.only] if options.only else MODELS:
            case = load_case(name, options.data, options.models, quick=options.quick)
            corpus = keep_out(case.corpus(), options.seed)
            quantiser = Quantiser(case.parts, corpus, options.seed, show_progress=True)
            for reduction in options.param_reduction:
                rows += measure(case, quantiser, work, reduction=reduction, distill_steps=steps)
                write(result, options.output)
    show(rows)


if __name__ == "__main__":
    main()
