"""Perplexity against bytes of the output layer: this package's heads beside their peers, one run.

    python -m benchmarks.quality --output benchmarks/results/quality.json

Writes the results, a plot beside them, and prints a table. Everything is fitted to the same text
with the same statistics, made once, and judged on the same text by the project's protocol; no head
is trained. `benchmarks/peers/catalogue.py` lists the peers and settings. Each family of peers is
written when it is done, and one that the output holds is not made again: the same command goes on
after an interrupt, and `--only` and `--peers` make a part. With `--work FOLDER` the statistics of
the text are kept there.

How they are made comparable:
- Bytes are all that the output layer needs in a file: codes without gaps, scales, zero points,
  biases, codewords. Scales are counted, and used, in the type in which the peer stores them.
- Codewords and factors of low rank are in bfloat16, rounded before they are judged. Ours in
  float32, as the converter writes them from a float32 model, are rows of their own; the plot shows
  those in bfloat16.
- Every layer is judged by the dense float32 matrix (and bias) that its bytes decode to: no
  activations are rounded, no kernel's rounding counts, neither ours nor a peer's.
- The head of SmolLM2 comes from a file in Q8_0 (integers of 8 bits in blocks of 32 with a float16
  scale): 8-bit peers in blocks of 32 would be lossless by construction, for 1.0625 bytes a weight.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_vqlogits.conversion.metric import token_metric
from hf_vqlogits.conversion.quantise import Quantiser

from .calibrated import calibrated
from .peers.catalogue import FAMILIES, OURS
from .peers.layer import Compressed, Layer, UnavailableError
from .protocol import MODELS, Case, load_case
from .quality_plot import plot
from .rate_distortion import GaussianSource, compare, sources
from .record import score_of
from .results_file import ResultsFile
from .work_folder import WorkFolder

NOTES = [
    "The head of smollm2 comes from Q8_0: 8-bit peers in blocks of 32 are lossless by "
    "construction.",
    "Index codes (k-means, G = 1, too) are counted in bits without gaps, less than their file "
    "takes.",
    "Codewords are in bfloat16, and so judged, but in the rows that say float32.",
]
PEER_PACKAGES = ("torchao", "hqq", "bitsandbytes")


def measure(
    case: Case,
    results: ResultsFile,
    work: WorkFolder,
    peers: Sequence[str],
    *,
    seed: int,
    quick: bool,
) -> list[dict[str, str]]:
    """Fit and judge the peers of one model that are missing in the results.

    Returns:
        What could not be measured, with the reason.

    Raises:
        ValueError: the layer has a bias or transforms its logits, which peers know nothing of.
    """
    parts = case.parts
    if parts.bias is not None or parts.transform != type(parts.transform)():
        raise ValueError(f"The output layer of {case.name} is not a plain matrix, as peers need.")
    missing = [peer for peer in peers if not results.has(model=case.name, peer=peer)]
    if not missing:
        return []
    quantiser = Quantiser(parts, case.corpus(), seed, show_progress=True)
    statistics, told = calibrated(case, quantiser, work)
    layer = Layer(case, quantiser, statistics)
    bounds = sources(token_metric(layer.weight, statistics))
    skipped: list[dict[str, str]] = []
    for peer in missing:
        try:
            rows = _judge_family(layer, peer, bounds, quick)
        except UnavailableError as error:
            skipped.append({"model": case.name, "peer": peer, "reason": str(error)})
        else:
            results.add([row | told for row in rows])
    return skipped


def _judge_family(
    layer: Layer, peer: str, bounds: dict[str, GaussianSource], quick: bool
) -> list[dict[str, Any]]:
    """Rows of every setting of a family, judged in one pass over the text."""
    rows: dict[str, dict[str, Any]] = {}
    heads: dict[str, Compressed] = {}
    start = time.perf_counter()
    for setting, made in FAMILIES[peer](layer, quick):
        heads[setting] = made
        rows[setting] = {
            "model": layer.case.name,
            "peer": peer,
            "setting": setting,
            "bytes": made.total_bytes,
            "bits_per_weight": made.bits_per_weight,
            "seconds": time.perf_counter() - start,
            "details": made.details,
        }
        if peer == OURS:
            rows[setting]["rate_distortion"] = compare(
                bounds, made.details["bits_per_token"], made.details["error"]
            )
        start = time.perf_counter()
    scores = layer.case.judge(heads)
    return [row | score_of(scores, setting) for setting, row in rows.items()]


def show(rows: Sequence[Mapping[str, Any]], skipped: Sequence[Mapping[str, str]]) -> None:
    """Print the rows, the smallest first, and the distance of ours from the bound."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for model in dict.fromkeys(row["model"] for row in rows):
        table = Table(title=model)
        for column in ("peer", "setting"):
            table.add_column(column)
        for column in ("MB", "bits a weight", "factor", "same greedy token", "seconds"):
            table.add_column(column, justify="right")
        mine = [row for row in rows if row["model"] == model]
        for row in sorted(mine, key=lambda row: row["bytes"]):
            agreement = [text["greedy_agreement"] for text in row["texts"].values()]
            table.add_row(
                row["peer"],
                row["setting"],
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['bits_per_weight']:.2f}",
                f"x{row['factor']:.4f}",
                " / ".join(f"{share:.1%}" for share in agreement),
                f"{row['seconds']:.0f}",
                style="bold" if row["peer"] == OURS else None,
            )
        console.print(table)
        limits = Table(title=f"{model}: error of sign codes over the Gaussian bound")
        for column in ("bits a token", "error", "over fixed", "bits", "over spread", "bits"):
            limits.add_column(column, justify="right")
        for row in mine:
            if row["peer"] == OURS and "float32" not in row["setting"]:
                found = row["rate_distortion"]
                limits.add_row(
                    f"{row['details']['bits_per_token']:,.0f}",
                    f"{found['error']:.2e}",
                    *(
                        cell
                        for name in ("fixed", "spread")
                        for cell in (
                            f"{found[f'error_over_{name}_bound']:.2f}",
                            f"{found[f'{name}_bits_at_error']:,.0f}",
                        )
                    ),
                )
        console.print(limits)
    for one in skipped:
        console.print(f"skipped: {one['model']}, {one['peer']}: {one['reason']}")


def main() -> None:
    """Measure, write, plot and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--models", type=Path, default=Path("../shared/models"))
    p.add_argument("--only", choices=MODELS, help="one of the models")
    p.add_argument("--peers", nargs="+", choices=FAMILIES, help="some families; default all")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="a twentieth of the text, fewer settings")
    p.add_argument("--work", type=Path, help="folder of the statistics; default none are kept")
    p.add_argument("--output", type=Path, required=True, help="JSON; rows in it are kept")
    options = p.parse_args()
    settings = {"seed": options.seed, "quick": options.quick}
    with tempfile.TemporaryDirectory() as folder:
        try:
            work = WorkFolder(options.work or Path(folder), settings)
            results = ResultsFile(
                options.output, "quality", *PEER_PACKAGES, settings={**settings, "notes": NOTES}
            )
        except ValueError as error:
            p.error(str(error))
        skipped: list[dict[str, str]] = []
        peers = options.peers or [*FAMILIES]
        for name in [options.only] if options.only else MODELS:
            case = load_case(name, options.data, options.models, quick=options.quick)
            skipped += measure(case, results, work, peers, **settings)
            plot(results.rows, options.output.with_suffix(".png"))
    show(results.rows, skipped)


if __name__ == "__main__":
    main()
