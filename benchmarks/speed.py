"""Time of the logits beside the dense layer and other peers, on random tensors of real shapes.

    python -m benchmarks.speed --output benchmarks/results/speed.json

Each figure is the median of calls taken in turns with the others', in one run, given twice: `warm`,
each call after five of its own, so that the caches hold what fits in them, and `cold`, after 512 MB
of other memory was read, as in `generate` the rest of the model is. Before it is timed, the output
of every call is checked. Beside each figure of ours stands what no kernel can go below on the
machine: the bytes that must move at the rate at which memory is read, and the look-ups at the rate
at which the processor permutes registers, both measured in the run. A plot beside the results shows
how the times grow with vocabulary, rows, bits and threads.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config

from hf_vqlogits import VQLogitsConfig, VQLogitsHead
from hf_vqlogits.conversion.sizes import DEFAULT_FINE_SHARE
from hf_vqlogits.conversion.timing import paired_medians
from hf_vqlogits.ops import backends, cpu, scores

from . import losses
from . import speed_peers as peers
from .limits import Rates, lookups, measured_rates
from .record import record, write
from .speed_plot import plot
from .speed_tables import codes_of
from .warm_cold import warm_and_cold


@dataclass(frozen=True)
class Point:
    """What is timed.

    Attributes:
        vocab_size: V.
        hidden_size: d.
        bits: R of sign codes, of which a tenth of the tokens have second ones, or about as many of
            index codes.
        codebook_size: K of index codes; None for sign codes.
        rows: N.
        threads: of PyTorch; None leaves it.
        beside: other peers than the dense layers as well.
    """

    vocab_size: int = 50_257
    hidden_size: int = 768
    bits: int = 500
    codebook_size: int | None = None
    rows: int = 1
    threads: int | None = None
    beside: bool = False

    @property
    def head(self) -> dict[str, Any]:
        """Fields of the configuration that say what the codes are."""
        if self.codebook_size is None:  # as many second codes as the converter makes
            fine = int(DEFAULT_FINE_SHARE * self.vocab_size)
            return {"num_codebooks": self.bits, "num_fine_tokens": fine}
        index_bits = (self.codebook_size - 1).bit_length()
        return {
            "code_type": "index",
            "num_codebooks": max(1, self.bits // index_bits),
            "codebook_size": self.codebook_size,
        }


POINTS = (
    *(Point(rows=n, bits=r, beside=r == 500) for n in (1, 8, 64) for r in (250, 500, 1000)),
    *(Point(262_144, 640, bits=r) for r in (900, 2600)),  # the shape of Gemma 3 270M
    *(Point(codebook_size=k, rows=n) for k in (16, 256) for n in (1, 64)),
    *(Point(bits=9, codebook_size=503, rows=n) for n in (1, 64)),  # the paper's form at 99%
)
SCALING = {
    "vocab_size": [Point(vocab_size=v << 10) for v in (32, 64, 128, 256, 512, 1024)],
    "rows": [Point(rows=n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)],
    "bits": [Point(bits=r) for r in (125, 250, 500, 1000, 2000, 4000)],
    "threads": [],  # as many as the machine has, see `scaling_points`
}
LOSS_ROWS = (2048,)
QUICK_LOSS_ROWS = (64,)
QUICK = (
    Point(vocab_size=5_000, hidden_size=128, bits=100, beside=True),
    Point(vocab_size=5_000, hidden_size=128, bits=100, codebook_size=16),
)


@torch.no_grad()
def measure(point: Point, rates: Rates, *, seed: int) -> dict[str, Any]:
    """Median milliseconds of every call, warm and cold, and the limits of ours."""
    with _threads(point.threads):
        return _measure(point, rates, seed)


def _measure(point: Point, rates: Rates, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=point.vocab_size, n_embd=point.hidden_size, bos_token_id=0, eos_token_id=0
    )
    head = VQLogitsHead(VQLogitsConfig(text_config=config, **point.head)).eval()
    hidden = torch.randn(point.rows, point.hidden_size)
    weight = torch.randn(point.vocab_size, point.hidden_size)
    calls: peers.Calls = {"quantised": lambda: head(hidden), **peers.dense(hidden, weight)}
    path = backends.for_expand(
        scores(hidden, head.codebook, head.codebook_bias, scale=1.0),
        head.codes,
        head.code_type,
    )
    if point.beside:
        others = [other for other in cpu.paths() if other not in (path, "neon")]
        calls |= peers.best_tokens(head, hidden)
        calls |= peers.other_backends(head, hidden, *others, "matmul")
        calls |= peers.integers(hidden, weight)
        calls |= peers.torchao_int8(hidden, weight)
        calls |= peers.adaptive_softmax(hidden, point.vocab_size)
        calls |= peers.clustered_embedder(hidden, weight)
        calls |= peers.fast_scan(hidden, weight, point.bits)
    head_exact = torch.nn.functional.linear(hidden, *head.to_linear())
    errors = peers.check(calls, hidden @ weight.T, head, head_exact)
    seconds = warm_and_cold(calls)
    storage = head.storage()
    output_bytes = 4 * point.rows * point.vocab_size
    least = rates.seconds(
        moved_bytes=storage["total_bytes"] + output_bytes,
        lookups=lookups(
            point.vocab_size,
            head.num_codebooks,
            head.num_fine_tokens,
            path,
            point.rows,
            codewords=point.codebook_size or 2,
        ),
    )
    return {
        "vocab_size": point.vocab_size,
        "hidden_size": point.hidden_size,
        "bits": point.bits,
        "num_codebooks": head.num_codebooks,
        "codebook_size": point.codebook_size,
        "rows": point.rows,
        "threads": torch.get_num_threads(),
        "fine_tokens": head.num_fine_tokens,
        "errors_in_deviations_of_the_logits": errors,
        "limit_milliseconds": {
            name: None if value is None else 1e3 * value
            for name, value in zip(("bytes", "lookups"), least, strict=True)
        },
        **{state: _figures(found) for state, found in seconds.items()},
    }


def measure_loss(rows: int, point: Point, *, seed: int) -> dict[str, Any]:
    """Median milliseconds of the training loss, forward and backward, of every layer."""
    made = losses.steps(rows, point.vocab_size, point.hidden_size, point.bits, seed=seed)
    calls = {name: build() for name, build in made.items()}
    figures = _figures(paired_medians(calls, torch.device("cpu")))
    return {"rows": rows, "bits": point.bits, **figures}


def _figures(seconds: dict[str, float]) -> dict[str, Any]:
    own = seconds["quantised"]
    return {
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "times_faster_than_float32": seconds["dense_float32"] / own,
        "times_faster_than_bfloat16": seconds["dense_bfloat16"] / own,
    }


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scaling_points() -> dict[str, list[Point]]:
    """Points along each axis of the plot, with as many threads as there are."""
    most = torch.get_num_threads()
    counts = sorted({1, most, *(n for n in (2, 4, 8, 16, 32) if n < most)})
    return {**SCALING, "threads": [Point(threads=n) for n in counts]}


def show(row: dict[str, Any]) -> None:
    """Print a row: ours beside the dense layers and its limits, then the others."""
    limits = row["limit_milliseconds"]
    told = ", ".join(f"{value:.3f} ms by {name}" for name, value in limits.items() if value)
    print(
        f"V {row['vocab_size']:,}, d {row['hidden_size']}, {codes_of(row)}, N {row['rows']}, "
        f"{row['threads']} threads; no kernel below {told}"
    )
    for state in ("warm", "cold"):
        found = row[state]
        print(
            f"  {state}: {found['milliseconds']['quantised']:.3f} ms, "
            f"{found['times_faster_than_float32']:.1f}x / "
            f"{found['times_faster_than_bfloat16']:.1f}x faster than float32 / bfloat16"
        )
    for name in list(row["warm"]["milliseconds"])[1:]:
        times = (row[state]["milliseconds"][name] for state in ("warm", "cold"))
        print(f"    {name}: " + " / ".join(f"{value:.3f}" for value in times) + " ms")


def show_loss(row: dict[str, Any]) -> None:
    """Print the times of a loss."""
    print(
        f"loss, forward and backward, N {row['rows']}, R {row['bits']}: "
        f"{row['times_faster_than_float32']:.1f}x / {row['times_faster_than_bfloat16']:.1f}x "
        "faster than float32 / bfloat16"
    )
    for name, value in row["milliseconds"].items():
        print(f"    {name}: {value:.0f} ms")


def main() -> None:
    """Measure, write, plot and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="one small layer, to see that it runs")
    p.add_argument("--output", type=Path, required=True)
    options = p.parse_args()
    rates = measured_rates()
    rows: list[dict[str, Any]] = []
    loss: list[dict[str, Any]] = []
    scaling: dict[str, list[dict[str, Any]]] = {}
    result = record(
        "speed",
        "torchao",
        quick=options.quick,
        seed=options.seed,
        rates=rates.to_dict(),
        rows=rows,
        loss=loss,
        scaling=scaling,
    )
    for point in QUICK if options.quick else POINTS:
        rows.append(measure(point, rates, seed=options.seed))
        show(rows[-1])
        write(result, options.output)
    point = QUICK[0] if options.quick else Point()
    for count in QUICK_LOSS_ROWS if options.quick else LOSS_ROWS:
        loss.append(measure_loss(count, point, seed=options.seed))
        show_loss(loss[-1])
        write(result, options.output)
    axes = {"rows": [QUICK[0]]} if options.quick else scaling_points()
    for axis, points in axes.items():
        scaling[axis] = [measure(point, rates, seed=options.seed) for point in points]
        write(result, options.output)
    plot(scaling, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
