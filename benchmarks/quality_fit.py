"""Perplexity of fitted heads, and after the distillation of the head, by the project's protocol.

    python -m benchmarks.quality_fit --data DATA --models MODELS --output benchmarks/results/...

The command behind `benchmarks/results/quality_fit.json` and the table in the README.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

from hf_vqlogits.conversion.options import DISTILL_STEPS
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import HeadSize, choose_size

from .models import fit_head
from .protocol import MODELS, Case, load_case
from .record import record, score_of, write

ROWS = (
    ("signs", 0.99),
    ("signs", 0.98),
    ("signs", 0.96),
    ("residual", 0.99),
    ("kmeans", 0.99),
)


def measure(case: Case, *, seed: int, distill_steps: int) -> list[dict[str, Any]]:
    """One row of figures for each of `ROWS`, and for each that is distilled."""
    quantiser = Quantiser(case.parts, case.corpus(), seed, show_progress=True)
    with quantiser.timed("calibration"):
        statistics = quantiser.calibrate(to_distill=True)
    vocab_size, hidden_size = case.parts.weight.shape
    heads, sizes, seconds, told = {}, {}, {}, {}
    for method, reduction in ROWS:
        size = choose_size(
            method, vocab_size=vocab_size, hidden_size=hidden_size, param_reduction=reduction
        )
        start = time.perf_counter()
        head = fit_head(quantiser, method, size, statistics)
        name = f"{method} {reduction:.1%}"
        heads[name], sizes[name] = head, size
        seconds[name] = time.perf_counter() - start
        if method == "signs" and distill_steps:
            name = f"{method} {reduction:.1%} distilled"
            heads[name], sizes[name] = copy.deepcopy(head), size
            start = time.perf_counter()
            quantiser.distill(heads[name], distill_steps, statistics)
            seconds[name] = time.perf_counter() - start
            told[name] = quantiser.details.pop("distillation")
    scores = case.judge(heads)
    return [
        _row(case, name, head, sizes[name], seconds[name], quantiser, scores)
        | {"distillation": told.get(name)}
        for name, head in heads.items()
    ]


def _row(
    case: Case,
    name: str,
    head: Any,
    size: HeadSize,
    seconds: float,
    quantiser: Quantiser,
    scores: Any,
) -> dict[str, Any]:
    storage = head.storage()
    return {
        "model": case.name,
        "head": name,
        "code_type": size.code_type,
        "num_codebooks": size.num_codebooks,
        "codebook_size": size.codebook_size,
        **storage,
        "dense_bytes_bfloat16": case.parts.weight.numel() * 2,
        **score_of(scores, name),
        "seconds": seconds,
        "calibration_seconds": quantiser.seconds["calibration"],
        "calibration_tokens": case.calibration.numel(),
    }


def main() -> None:
    """Measure and write the results."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--models", type=Path, default=Path("../shared/models"))
    p.add_argument("--only", choices=MODELS, help="one of the models")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--distill-steps", type=int, default=DISTILL_STEPS)
    p.add_argument("--quick", action="store_true", help="a twentieth of the text")
    p.add_argument("--output", type=Path, required=True)
    options = p.parse_args()
    rows: list[dict[str, Any]] = []
    result = record("quality_fit", quick=options.quick, seed=options.seed, rows=rows)
    for name in [options.only] if options.only else MODELS:
        case = load_case(name, options.data, options.models, quick=options.quick)
        rows += measure(case, seed=options.seed, distill_steps=options.distill_steps)
        # After each model: a run of an hour should not lose the first for the second.
        write(result, options.output)
    for row in rows:
        texts = "  ".join(f"{t} x{v['factor']:.4f}" for t, v in row["texts"].items())
        print(f"{row['model']:12} {row['head']:24} x{row['factor']:.4f}  {texts}")


if __name__ == "__main__":
    main()
