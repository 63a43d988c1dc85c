"""Whole models distilled from the original, body too: `--body-distill-steps` of the converter.

    python -m benchmarks.whole_model --work FOLDER --output benchmarks/results/whole_model.json

Heads of sign codes for SmolLM2-135M, fitted by the project's protocol, with the dense input
embedding or tied to it. Then the whole model is trained towards the original on the protocol's
calibration text, as the converter does it, and judged by the protocol. No labels are learnt: the
original model is the teacher, and what it is compared with.

Each row is written when it is done, and one that the output holds is not made again.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_vqlogits.conversion.calibration import CalibrationStatistics
from hf_vqlogits.conversion.comparison import HeadScore, compare_heads, judge_model
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import choose_size
from hf_vqlogits.conversion.streaming import hidden_states

from .calibrated import calibrated
from .models import fit_head
from .protocol import MODELS, Case, load_case
from .record import score_of
from .results_file import ResultsFile
from .work_folder import WorkFolder

QUICK_STEPS = 4


@dataclass(frozen=True)
class Row:
    """A size, and what becomes of the input embedding, `"keep"` or `"tied"`."""

    reduction: float
    embeddings: str = "keep"


ROWS = {
    "99": Row(0.99),
    "98": Row(0.98),
    "96": Row(0.96),
    "tied-98": Row(0.98, "tied"),
    "tied-96": Row(0.96, "tied"),
}


class Bench:
    """A model, and what of it all rows share.

    Args:
        case: model and text.
        work: where the statistics of the calibration text are kept.
        seed: of everything random.
    """

    def __init__(self, case: Case, work: WorkFolder, seed: int):
        self.case = case
        self.quantiser = Quantiser(case.parts, case.corpus(), seed, show_progress=True)
        self.statistics: CalibrationStatistics
        self.statistics, self.told = calibrated(case, self.quantiser, work)
        self.dense = {
            text: compare_heads(hidden_states(case.parts.backbone, ids), case.parts.logits, {})
            for text, ids in case.evaluation.items()
        }

    def measure(self, row: Row, steps: int) -> dict[str, Any]:
        """One row of figures: the factor before the training and after it."""
        vocab_size, hidden_size = self.case.parts.weight.shape
        size = choose_size(
            "signs",
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            param_reduction=row.reduction,
        )
        quantiser, tied = self.quantiser, row.embeddings == "tied"
        start = time.perf_counter()
        quantiser.besides = quantiser.input_metric() if tied else None
        head = fit_head(quantiser, "signs", size, self.statistics)
        embedding = quantiser.embedding("tied", head, size.num_codebooks) if tied else None
        fitted = time.perf_counter()
        untrained = quantiser.trained_body(head, embedding, 0)
        before = self._scores(untrained, head)
        started = time.perf_counter()
        body = quantiser.trained_body(head, embedding, steps)
        seconds = time.perf_counter() - started
        scores = self._scores(body, head)
        return {
            "model": self.case.name,
            "embeddings": row.embeddings,
            "reduction": row.reduction,
            "num_codebooks": size.num_codebooks,
            **head.storage(),
            "fit_seconds": fitted - start,
            "seconds": seconds,
            "steps": steps,
            "fitted": score_of(before, "quantised"),
            **score_of(scores, "quantised"),
            "distillation": quantiser.details.pop("body"),
            **self.told,
        }

    def _scores(self, body: Any, head: Any) -> dict[str, dict[str, HeadScore]]:
        """Text -> name -> score, of the dense model and of a body with the head."""
        found = {}
        for text, ids in self.case.evaluation.items():
            dense = self.dense[text]["dense"]
            own = judge_model(hidden_states(body, ids), head, dense.choices)
            found[text] = {"dense": dense, "quantised": own}
        return found


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    table = Table()
    for column in ("model", "size", "input", "fitted", "trained", "by text", "same token"):
        table.add_column(column)
    for column in ("steps", "minutes"):
        table.add_column(column, justify="right")
    for row in rows:
        texts = row["texts"].values()
        table.add_row(
            row["model"],
            f"{row['reduction']:.0%}",
            row["embeddings"],
            f"x{row['fitted']['factor']:.4f}",
            f"x{row['factor']:.4f}",
            " / ".join(f"x{text['factor']:.4f}" for text in texts),
            " / ".join(f"{text['greedy_agreement']:.1%}" for text in texts),
            f"{row['steps']:,}",
            f"{row['seconds'] / 60:.1f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    """Make what is missing, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--models", type=Path, default=Path("../shared/models"))
    p.add_argument("--model", choices=MODELS, default="smollm2")
    p.add_argument("--only", nargs="+", choices=ROWS, help="some rows; default all")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="a twentieth of the text, few steps")
    p.add_argument("--work", type=Path, help="folder of the statistics; default none are kept")
    p.add_argument("--output", type=Path, required=True, help="JSON; rows in it are kept")
    options = p.parse_args()
    steps = QUICK_STEPS if options.quick else options.steps
    settings = {"seed": options.seed, "quick": options.quick}
    with tempfile.TemporaryDirectory() as folder:
        try:
            work = WorkFolder(options.work or Path(folder), settings)
            results = ResultsFile(
                options.output, "whole_model", settings={**settings, "steps": steps}
            )
        except ValueError as error:
            p.error(str(error))
        rows = [ROWS[name] for name in options.only or ROWS]
        missing = [
            row
            for row in rows
            if not results.has(
                model=options.model, reduction=row.reduction, embeddings=row.embeddings
            )
        ]
        if missing:
            case = load_case(options.model, options.data, options.models, quick=options.quick)
            bench = Bench(case, work, options.seed)
        for row in missing:
            results.add([bench.measure(row, steps)])
    show(results.rows)


if __name__ == "__main__":
    main()
