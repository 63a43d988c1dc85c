"""What rounding in the CPU kernels does to logits and perplexity, at every size.

    python -m benchmarks.rounding --work FOLDER --output benchmarks/results/rounding.json

Heads of sign codes at the sizes of `benchmarks.quality`, fitted by the project's protocol, each run
through every compiled path that this processor has, and through eager PyTorch in float32, on the
same hidden states of text kept out. A path's figures: its perplexity over eager's, less one; how
often its most likely token is eager's; and the largest error of any logit, in nats.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.conversion.comparison import compare_heads
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.streaming import hidden_states
from hf_vqlogits.ops import backends, cpu

from .calibrated import calibrated
from .peers.catalogue import KEPT_PERCENT
from .peers.layer import Layer
from .peers.vector_codes import fitted_head
from .protocol import MODELS, Case, load_case
from .results_file import ResultsFile
from .training import first_tokens
from .work_folder import WorkFolder

REFERENCE = "eager"
ERROR_ROWS = 512  # of each text, whose logits are compared one by one


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Run operations by one implementation."""
    before = os.environ.get(backends.VARIABLE)
    os.environ[backends.VARIABLE] = backend
    try:
        yield
    finally:
        del os.environ[backends.VARIABLE]
        if before is not None:
            os.environ[backends.VARIABLE] = before


def through(head: VQLogitsHead, backend: str) -> Callable[[Tensor], Tensor]:
    """The head, always by one implementation."""

    def logits(hidden: Tensor) -> Tensor:
        with forced(backend):
            return head(hidden)

    return logits


@torch.no_grad()
def compared(head: VQLogitsHead, states: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Figures of every path, by path and text.

    Args:
        head: the layer.
        states: batches of hidden states (n, d) and next tokens (n,) of every text.
    """
    exact = through(head, REFERENCE)
    layers = {path: through(head, path) for path in cpu.paths()}
    found: dict[str, Any] = {path: {} for path in layers}
    for text, batches in states.items():
        scores = compare_heads(batches, exact, layers)
        some = batches[0][0][:ERROR_ROWS]
        wanted = exact(some)
        for path, layer in layers.items():
            found[path][text] = {
                "perplexity_change": math.expm1(scores[path].nats - scores["dense"].nats),
                "same_token": scores[path].agreement,
                "largest_error": float((layer(some) - wanted).abs().max()),
                "largest_logit": float(wanted.abs().max()),
                "tokens": scores[path].tokens,
            }
    return found


def measure(
    case: Case, work: WorkFolder, sizes: Sequence[float], tokens: int, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each size, in percent of the parameters kept."""
    quantiser = Quantiser(case.parts, case.corpus(), seed, show_progress=True)
    statistics, _ = calibrated(case, quantiser, work)
    layer = Layer(case, quantiser, statistics)
    states = {
        text: list(hidden_states(case.parts.backbone, first_tokens(blocks, tokens)))
        for text, blocks in case.evaluation.items()
    }
    for percent in sizes:
        head = fitted_head(layer, "signs", 1 - percent / 100)
        yield {
            "model": case.name,
            "kept_percent": percent,
            "num_codebooks": head.num_codebooks,
            "paths": compared(head, states),
        }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows, the worst text of each path."""
    table = Table()
    for column in ("model", "kept", "R", "path", "perplexity", "same token", "largest error"):
        table.add_column(column, justify="right")
    for row in rows:
        for path, texts in row["paths"].items():
            figures = texts.values()
            changes = [one["perplexity_change"] for one in figures]
            table.add_row(
                row["model"],
                f"{row['kept_percent']:g}%",
                f"{row['num_codebooks']:,}",
                path,
                f"{max(changes, key=abs):+.5%}",
                f"{min(one['same_token'] for one in figures):.2%}",
                f"{max(one['largest_error'] for one in figures):.4f}",
            )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    """Measure, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--models", type=Path, default=Path("../shared/models"))
    p.add_argument("--only", choices=MODELS, help="one of the models")
    p.add_argument("--tokens", type=int, default=16_384, help="of each text")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="a twentieth of the text, one size")
    p.add_argument("--work", type=Path, help="folder of the statistics; default none are kept")
    p.add_argument("--output", type=Path, required=True, help="JSON; rows in it are kept")
    options = p.parse_args()
    if not cpu.paths():
        p.error("no CPU kernel is compiled here; install the package with a C++ compiler")
    settings = {"seed": options.seed, "quick": options.quick}
    sizes = KEPT_PERCENT[:1] if options.quick else KEPT_PERCENT
    with tempfile.TemporaryDirectory() as folder:
        try:
            work = WorkFolder(options.work or Path(folder), settings)
            results = ResultsFile(
                options.output, "rounding", settings={**settings, "tokens": options.tokens}
            )
        except ValueError as error:
            p.error(str(error))
        for name in [options.only] if options.only else MODELS:
            missing = [
                percent for percent in sizes if not results.has(model=name, kept_percent=percent)
            ]
            if missing:
                case = load_case(name, options.data, options.models, quick=options.quick)
                for row in measure(case, work, missing, options.tokens, options.seed):
                    results.add([row])
    show(results.rows)


if __name__ == "__main__":
    main()
