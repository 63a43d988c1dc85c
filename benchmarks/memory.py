"""Memory of the training loss, forward and backward, beside dense layers.

    python -m benchmarks.memory --output benchmarks/results/memory.json

Each figure is the largest resident memory of a process of its own, which makes one step, less what
it held before: hidden states and weights are there already, gradients are not. Linux only.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .losses import steps
from .record import record, write

VOCAB_SIZE, HIDDEN_SIZE, BITS = 50_257, 768, 500
ROWS = (512, 2048, 8192)
LAYERS = (
    "quantised",
    "quantised_bfloat16",
    "dense_float32",
    "dense_bfloat16",
    "adaptive softmax",
)
STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(layer: str, rows: int, sizes: Sequence[int], *, seed: int) -> int:
    """Bytes that one step takes at most, in this process.

    Args:
        layer: one of `LAYERS`.
        rows: N.
        sizes: V, d and R.
        seed: of everything random.
    """
    vocab_size, hidden_size, bits = sizes
    # A first step of few rows: what libraries set up once is not the step's.
    steps(8, vocab_size, hidden_size, bits, seed=seed)[layer]()()
    step = steps(rows, vocab_size, hidden_size, bits, seed=seed)[layer]()
    PEAK_RESET.write_text("5")  # the peak starts again from what is held now
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A line of the process's status, in bytes."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def measure(rows: int, sizes: Sequence[int], *, seed: int) -> dict[str, Any]:
    """One row of figures: each layer in a process of its own."""
    figures: dict[str, int] = {}
    for layer in LAYERS:
        words = ["--layer", layer, "--rows", str(rows), "--seed", str(seed), "--sizes"]
        command = [sys.executable, "-m", "benchmarks.memory", *words, *map(str, sizes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        figures[layer] = json.loads(done.stdout.splitlines()[-1])
    own = figures["quantised"]
    return {
        "rows": rows,
        "bytes": figures,
        "times_less_than_float32": figures["dense_float32"] / own,
        "times_less_than_bfloat16": figures["dense_bfloat16"] / own,
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows."""
    table = Table()
    for column in ("rows N", *LAYERS, "less than float32 / bfloat16"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['rows']:,}",
            *(f"{row['bytes'][layer] / 1e6:,.0f} MB" for layer in LAYERS),
            f"{row['times_less_than_float32']:.1f}x / {row['times_less_than_bfloat16']:.1f}x",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    """Measure, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="a small layer, to see that it runs")
    p.add_argument("--output", type=Path)
    p.add_argument("--layer", choices=LAYERS, help="print one figure, in bytes, and write nothing")
    p.add_argument("--rows", type=int, default=ROWS[0])
    p.add_argument("--sizes", type=int, nargs=3, default=(VOCAB_SIZE, HIDDEN_SIZE, BITS))
    options = p.parse_args()
    if not PEAK_RESET.exists():
        p.error(f"{PEAK_RESET} is needed, which Linux alone has")
    if options.layer:
        print(peak_bytes(options.layer, options.rows, options.sizes, seed=options.seed))
        return
    if options.output is None:
        p.error("the following argument is required: --output")
    sizes, all_rows = ((3000, 64, 50), (256,)) if options.quick else (options.sizes, ROWS)
    rows: list[dict[str, Any]] = []
    names = ("vocab_size", "hidden_size", "bits")
    result = record("memory", seed=options.seed, **dict(zip(names, sizes, strict=True)), rows=rows)
    for count in all_rows:
        rows.append(measure(count, sizes, seed=options.seed))
        write(result, options.output)
    show(rows)


if __name__ == "__main__":
    main()
