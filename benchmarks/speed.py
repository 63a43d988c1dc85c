"""Time of the logits beside the dense layer, on random tensors of a real shape.

    python -m benchmarks.speed --output benchmarks/results/speed.json

Each figure is the median of calls taken in turns with the dense layer's, in one run, given twice:
`warm`, each call after five of its own, so that the caches hold what fits in them, and `cold`,
after 512 MB of other memory was read, as in `generate` the rest of the model is. Before it is
timed, the head's output is compared with the exact sum.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config

from hf_vqlogits import VQLogitsConfig, VQLogitsHead
from hf_vqlogits.conversion.sizes import DEFAULT_FINE_SHARE
from hf_vqlogits.conversion.timing import paired_medians

from .record import record, write

VOCAB_SIZE, HIDDEN_SIZE = 50_257, 768
ROWS = (1, 8, 64)
WARM_CALLS = 5
OTHER_BYTES = 512 << 20
FINE_TOKENS = int(DEFAULT_FINE_SHARE * VOCAB_SIZE)  # have a second code, as the converter makes it
REDUCTIONS = {0.995: 250, 0.99: 501, 0.98: 1003}  # share saved: bits a token


@torch.no_grad()
def measure(rows: int, bits: int, *, seed: int) -> dict[str, Any]:
    """Median milliseconds and ratios for so many rows of hidden states."""
    generator = torch.Generator().manual_seed(seed)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=HIDDEN_SIZE)
    torch.manual_seed(seed)
    head = VQLogitsHead(
        VQLogitsConfig(text_config=config, num_codebooks=bits, num_fine_tokens=FINE_TOKENS)
    ).eval()
    hidden = torch.randn(rows, HIDDEN_SIZE, generator=generator)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    low_hidden, low_weight = hidden.bfloat16(), weight.bfloat16()
    exact = torch.nn.functional.linear(hidden, *head.to_linear())
    error = float((head(hidden) - exact).abs().max() / exact.std())
    layers: dict[str, Callable[[], Tensor]] = {
        "dense_float32": lambda: hidden @ weight.T,
        "dense_bfloat16": lambda: low_hidden @ low_weight.T,
        "quantised": lambda: head(hidden),
    }
    other = torch.zeros(OTHER_BYTES // 4)
    figures: dict[str, Any] = {
        "rows": rows,
        "bits": bits,
        "largest_error_in_deviations_of_the_logits": error,
    }
    preparations: dict[str, Callable[[Callable[[], Tensor]], object]] = {
        "warm": lambda call: [call() for _ in range(WARM_CALLS)],
        "cold": lambda call: other.sum(),
    }
    for state, prepare in preparations.items():
        seconds = paired_medians(layers, torch.device("cpu"), prepare)
        own = seconds["quantised"]
        figures[state] = {
            "milliseconds": {name: value * 1e3 for name, value in seconds.items()},
            "times_faster_than_float32": seconds["dense_float32"] / own,
            "times_faster_than_bfloat16": seconds["dense_bfloat16"] / own,
        }
    return figures


def main() -> None:
    """Measure and write the results."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="one row only")
    p.add_argument("--output", type=Path, required=True)
    options = p.parse_args()
    found = [
        measure(rows, bits, seed=options.seed)
        for rows in (ROWS[:1] if options.quick else ROWS)
        for bits in REDUCTIONS.values()
    ]
    result = record(
        "speed",
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        fine_tokens=FINE_TOKENS,
        seed=options.seed,
        rows=found,
    )
    write(result, options.output)
    for row in found:
        for state in ("warm", "cold"):
            found_here = row[state]
            print(
                f"N = {row['rows']:2}, R = {row['bits']:4}, {state}: "
                f"{found_here['milliseconds']['quantised']:.3f} ms, "
                f"{found_here['times_faster_than_float32']:.1f}x / "
                f"{found_here['times_faster_than_bfloat16']:.1f}x faster than float32 / bfloat16"
            )


if __name__ == "__main__":
    main()
