"""What each choice is worth: size, initialisation, mapping fixed or learned, what is trained.

    python -m benchmarks.ablation --output benchmarks/results/ablation.json

Writes the results, a plot beside them, and prints a table. Every row is one `Condition`; where a
row is trained on labels, it sees the same rows of the protocol's calibration text in the same
order, with the same schedule and learning rate as all others, and its factor is over the dense
model trained equally. What is fitted or distilled only is compared with the dense model as it is.

- Size: the paper's one codebook (k-means) of K codewords, and sign codes of R bits, R = K: the
  sizes that save the same parameters. Fitted, and after training of the whole model.
- Initialisation: the paper's four of one codebook, residual index codes, sign codes. Fitted, and
  after training of the output layer alone and of the whole model.
- Mapping: from the same fit, a distillation with the codes fixed, and one that learns codes too.
- Training: nothing, the output layer alone, the whole model; perplexities with the dense model's.
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.conversion.codebooks import perplexity_bound
from hf_vqlogits.conversion.comparison import HeadScore
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import HeadSize, choose_size

from .ablation_plot import plot
from .ablation_table import COLUMNS, cells
from .models import dense_model, fit_head, quantised_model
from .protocol import MODELS, Case, load_case
from .record import record, write
from .training import Schedule, compare, fine_tune, first_tokens, judge, training_rows

METHODS = ("random", "contiguous", "frequency", "kmeans", "residual", "signs")
REDUCTIONS = (0.9975, 0.995, 0.99, 0.98)
REDUCTION = 0.99  # of the sections that compare something else than sizes
TRAININGS = ("none", "head", "all")


@dataclass(frozen=True)
class Condition:
    """A head and what is done to it.

    Attributes:
        method: of the converter; None is the dense model.
        reduction: share of the output layer's parameters that it saves.
        distilled: `"no"`, `"codebook"` (codes fixed), or `"codes"` (and codebook).
        trained: on labels: `"none"`, `"head"` or `"all"`.
    """

    method: str | None
    reduction: float = 0.0
    distilled: str = "no"
    trained: str = "none"


def sections(reductions: Sequence[float], reduction: float) -> dict[str, list[Condition]]:
    """The conditions of every section; one may belong to several.

    Args:
        reductions: of the section of sizes.
        reduction: of those that compare something else.
    """
    sizes = [
        Condition(method, share, trained=trained)
        for method in ("kmeans", "signs")
        for share in reductions
        for trained in ("none", "all")
    ]
    starts = [
        Condition(method, reduction, trained=trained) for method in METHODS for trained in TRAININGS
    ]
    mapping = [
        Condition("signs", share, distilled)
        for share in reductions
        if share >= reduction
        for distilled in ("no", "codebook", "codes")
    ]
    mapping += [
        Condition("kmeans", reduction, distilled) for distilled in ("no", "codebook", "codes")
    ]
    dense = [Condition(None, trained=trained) for trained in TRAININGS]
    trained = [one for one in starts if one.method in ("kmeans", "signs")]
    return {
        "size": sizes,
        "initialisation": starts,
        "mapping": mapping,
        "training": [*dense, *trained],
    }


def in_order(conditions: Iterable[Condition]) -> list[Condition]:
    """Each condition once: dense ones first, then heads of a size together."""
    order = {trained: index for index, trained in enumerate(TRAININGS)}

    def key(one: Condition) -> tuple[Any, ...]:
        return one.method or "", -one.reduction, one.distilled != "no", order[one.trained]

    return sorted(dict.fromkeys(conditions), key=key)


class Ablation:
    """Makes and judges the conditions of one case.

    Args:
        case: model and text.
        schedule: of every training on labels.
        learning_rate: likewise.
        distill_steps: of every distillation.
        evaluation_tokens: of each text.
        seed: of everything random.
    """

    def __init__(
        self,
        case: Case,
        *,
        schedule: Schedule,
        learning_rate: float,
        distill_steps: int,
        evaluation_tokens: int,
        seed: int,
    ):
        self._case, self._schedule, self._rate = case, schedule, learning_rate
        self._distill_steps, self._seed = distill_steps, seed
        self._texts = {
            text: first_tokens(blocks, evaluation_tokens)
            for text, blocks in case.evaluation.items()
        }
        self._rows = training_rows(case.calibration, schedule.context)
        self._quantiser = Quantiser(case.parts, case.corpus(), seed, show_progress=True)
        self._statistics = self._quantiser.calibrate(to_distill=True)
        self._fitted: dict[tuple[str, float], tuple[HeadSize, VQLogitsHead]] = {}
        self._dense: dict[str, dict[str, HeadScore]] = {}

    def measure(self, condition: Condition) -> dict[str, Any]:
        """A row of figures.

        The dense model must have been measured with the same training before.
        """
        start = time.perf_counter()
        size, head, model = self._make(condition)
        if condition.trained != "none":
            fine_tune(
                model,
                self._rows,
                self._schedule,
                learning_rate=self._rate,
                seed=self._seed,
                what=condition.trained,
            )
        scores = judge(model, self._texts)
        if condition.method is None:
            self._dense[condition.trained] = scores
        factor, texts = compare(scores, self._dense[condition.trained])
        row = {**asdict(condition), "factor": factor, "texts": texts}
        if size is not None and head is not None:
            row |= {**asdict(size), **head.storage()}
            if size.code_type == "index" and size.num_codebooks == 1:
                bounds = {
                    text: perplexity_bound(head.codes, blocks[:, 1:])
                    for text, blocks in self._texts.items()
                }
                row["perplexity_bound"] = bounds
        return row | {"seconds": time.perf_counter() - start}

    def _make(
        self, condition: Condition
    ) -> tuple[HeadSize | None, VQLogitsHead | None, PreTrainedModel]:
        if condition.method is None:
            return None, None, dense_model(self._case.parts)
        size, fitted = self._fit(condition.method, condition.reduction)
        head = copy.deepcopy(fitted)
        if condition.distilled != "no":
            self._quantiser.distill(
                head,
                self._distill_steps,
                self._statistics,
                learn_codes=condition.distilled == "codes",
            )
        return size, head, quantised_model(self._quantiser, size, head)

    def _fit(self, method: str, reduction: float) -> tuple[HeadSize, VQLogitsHead]:
        key = method, reduction
        if key not in self._fitted:
            vocab_size, hidden_size = self._case.parts.weight.shape
            size = choose_size(
                method, vocab_size=vocab_size, hidden_size=hidden_size, param_reduction=reduction
            )
            head = fit_head(self._quantiser, method, size, self._statistics)
            self._fitted[key] = size, head
        return self._fitted[key]


def show(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> None:
    """Print a table of every section."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    for name in names:
        table = Table(title=name)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in COLUMNS[:3] else "right")
        for row in rows:
            if name in row["sections"]:
                table.add_row(*cells(row))
        console.print(table)


def main() -> None:
    """Measure, write, plot and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--models", type=Path, default=Path("../shared/models"))
    p.add_argument("--model", choices=MODELS, default="gpt2-novels")
    p.add_argument("--steps", type=int, default=40, help="of every training on labels")
    p.add_argument("--tokens-per-step", type=int, default=1024)
    p.add_argument("--batch-size", type=int, default=4, help="rows of a forward pass")
    p.add_argument("--context", type=int, default=256, help="tokens of a row")
    p.add_argument("--learning-rate", type=float, default=1e-4)
    p.add_argument("--head-factor", type=float, default=1.0, help="rate of codewords over others")
    p.add_argument("--distill-steps", type=int, default=64)
    p.add_argument("--evaluation-tokens", type=int, default=10_000, help="of each text")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="very little of all, to see that it runs")
    p.add_argument("--output", type=Path, required=True)
    options = p.parse_args()
    schedule = Schedule(
        options.steps,
        options.tokens_per_step,
        options.batch_size,
        options.context,
        options.head_factor,
    )
    reductions: Sequence[float] = REDUCTIONS
    reduction = REDUCTION
    distill_steps, judged = options.distill_steps, options.evaluation_tokens
    if options.quick:
        reductions, reduction = (0.999, 0.998), 0.998
        schedule, distill_steps, judged = replace(schedule, steps=2), 4, 1024
    case = load_case(options.model, options.data, options.models, quick=options.quick)
    ablation = Ablation(
        case,
        schedule=schedule,
        learning_rate=options.learning_rate,
        distill_steps=distill_steps,
        evaluation_tokens=judged,
        seed=options.seed,
    )
    named = sections(reductions, reduction)
    conditions = in_order(one for some in named.values() for one in some)
    rows: list[dict[str, Any]] = []
    result = record(
        "ablation",
        model=case.name,
        quick=options.quick,
        seed=options.seed,
        schedule=asdict(schedule),
        learning_rate=options.learning_rate,
        distill_steps=distill_steps,
        evaluation_tokens_of_each_text=judged,
        rows=rows,
    )
    for number, condition in enumerate(conditions, 1):
        row = ablation.measure(condition)
        rows.append(row | {"sections": [name for name, some in named.items() if condition in some]})
        write(result, options.output)  # an interrupted run keeps what it has
        print(
            f"{number} of {len(conditions)}: {condition.method or 'dense'} "
            f"{condition.reduction:g}, distilled {condition.distilled}, trained "
            f"{condition.trained}: x{row['factor']:.4f} in {row['seconds']:.0f} s",
            flush=True,
        )
    plot(rows, options.output.with_suffix(".png"))
    show(rows, named)


if __name__ == "__main__":
    main()
