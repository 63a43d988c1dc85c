"""Fine-tuned quantised models against the dense model fine-tuned equally.

    python -m benchmarks.finetuned --model smollm2 --work WORK --output RESULTS.json

Every model trains whole on the protocol's calibration text: the same rows in the same order, the
same steps and schedule, the best of the `--rates` each. The rate is chosen with the first seed, by
the loss on every `HELD_EVERY`-th row of that text, which neither fit nor training sees; the other
seeds run at that rate only. A figure is the perplexity over that of the dense model of the same
seed, on the first `--evaluation-tokens` of each text of the protocol; mean and spread over the
seeds.

Heads are fitted and distilled first, once; the models of rows `whole-...` are then distilled as a
whole from the original. No label is read in that, but the text is, once more than by the others.

What is done is kept in `--work`, a file a run: after an interrupt the same command goes on; with
other `--rates`, `--seeds` or `--only` it adds to what is there. A row that the output holds is not
made again: `--only` makes a part. Where `--work` is lost, the trainings of the dense model come
again with every part, because the others' greedy tokens are compared with theirs.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_vqlogits.conversion.codebooks import perplexity_bound
from hf_vqlogits.conversion.options import DISTILL_STEPS

from .pairing import pair, paired
from .protocol import MODELS, load_case
from .rates import at_edge
from .results_file import ResultsFile
from .training import Schedule
from .trainings import DENSE, ROWS, Bench, Row
from .work_folder import WorkFolder

QUICK_STEPS = 4
QUICK_TOKENS = 1024


def figures(bench: Bench, row: Row) -> dict[str, Any]:
    """All that is reported of a row, after the trainings of it that are missing."""
    dense = ROWS[DENSE]
    before, untuned = bench.untuned(row), bench.untuned(dense)
    trials, runs = bench.trials(row), bench.trained(row)
    rate = runs[bench.seeds[0]]["rate"]
    told: dict[str, Any] = {
        "model": bench.case.name,
        **asdict(row),
        "learning_rate": rate,
        "rate_at_edge": at_edge(rate, bench.rates),
        "held_out_nats_by_rate": {f"{run['rate']:g}": run["held_out_nats"] for run in trials},
        "untuned": pair(before, untuned, untuned),
        **paired(runs, bench.trained(dense), untuned),
    }
    if row.method is not None:
        size, head = bench.head(row)
        told |= {**asdict(size), **head.storage()}
        if size.code_type == "index" and size.num_codebooks == 1:
            told["perplexity_bound"] = {
                text: perplexity_bound(head.codes, blocks[:, 1:])
                for text, blocks in bench.texts.items()
            }
    return told


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    table = Table(title=f"{rows[0]['model']}, fine-tuned")
    for column in ("head", "rate", "untuned", "factor", "least to most"):
        table.add_column(column, justify="left" if column == "head" else "right")
    texts = list(rows[0]["texts"])
    for text in texts:
        table.add_column(f"perplexity, {text}", justify="right")
    for column in ("as tuned dense", "as untuned dense", "bound"):
        table.add_column(column, justify="right")
    for row in rows:
        bounds = row.get("perplexity_bound", {})
        table.add_row(
            row["name"],
            f"{row['learning_rate']:g}{' (edge)' if row['rate_at_edge'] else ''}",
            f"x{row['untuned']['factor']:.4f}",
            f"x{row['factor']['mean']:.4f}",
            f"{row['factor']['least']:.4f} to {row['factor']['most']:.4f}",
            *(f"{row['texts'][text]['perplexity']['mean']:.2f}" for text in texts),
            *(
                " / ".join(f"{row['texts'][text][kind]['mean']:.1%}" for text in texts)
                for kind in ("agreement_tuned_dense", "agreement_untuned_dense")
            ),
            " / ".join(f"{bounds[text]:.1f}" for text in texts if text in bounds),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> None:
    """Train what is missing, write the results and print them."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--models", type=Path, default=Path("../shared/models"))
    p.add_argument("--model", choices=MODELS, default="smollm2")
    p.add_argument("--work", type=Path, required=True, help="folder of what is done")
    p.add_argument("--only", nargs="+", choices=ROWS, help="rows; the dense one comes always")
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--tokens-per-step", type=int, default=1024)
    p.add_argument("--batch-size", type=int, default=4, help="rows of a forward pass")
    p.add_argument("--context", type=int, default=256, help="tokens of a row")
    p.add_argument("--rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4])
    p.add_argument("--head-factor", type=float, default=1.0, help="rate of codewords over others")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--distill-steps", type=int, default=DISTILL_STEPS)
    p.add_argument("--body-distill-steps", type=int, default=250, help="of the whole-... rows")
    p.add_argument("--evaluation-tokens", type=int, default=20_000, help="of each text")
    p.add_argument("--quick", action="store_true", help="very little of all, to see that it runs")
    p.add_argument("--output", type=Path, required=True, help="JSON; rows in it are kept")
    options = p.parse_args()
    steps = min(options.steps, QUICK_STEPS) if options.quick else options.steps
    distill_steps = QUICK_STEPS if options.quick else options.distill_steps
    body_distill_steps = QUICK_STEPS if options.quick else options.body_distill_steps
    judged = QUICK_TOKENS if options.quick else options.evaluation_tokens
    schedule = Schedule(
        steps, options.tokens_per_step, options.batch_size, options.context, options.head_factor
    )
    settings = {
        "model": options.model,
        "quick": options.quick,
        "steps": steps,
        "tokens_per_step": options.tokens_per_step,
        "batch_size": options.batch_size,
        "context": options.context,
        "distill_steps": distill_steps,
        "body_distill_steps": body_distill_steps,
        "evaluation_tokens": judged,
    }
    try:
        work = WorkFolder(options.work, settings)
        results = ResultsFile(
            options.output,
            "finetuned",
            settings={
                **settings,
                "head_factor": options.head_factor,
                "candidate_rates": options.rates,
                "seeds": options.seeds,
            },
        )
    except ValueError as error:
        p.error(str(error))
    case = load_case(options.model, options.data, options.models, quick=options.quick)
    rows = [ROWS[name] for name in dict.fromkeys([DENSE, *(options.only or ROWS)])]
    bench = Bench(
        case,
        work,
        rows,
        schedule=schedule,
        rates=options.rates,
        seeds=options.seeds,
        distill_steps=distill_steps,
        body_distill_steps=body_distill_steps,
        evaluation_tokens=judged,
    )
    for row in rows:
        if not results.has(name=row.name):
            results.add([figures(bench, row)])  # hours may pass until the next
    show(results.rows)


if __name__ == "__main__":
    main()
