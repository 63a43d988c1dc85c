"""Time of logits and loss on a GPU beside the dense layer, V 128,256 and d 4,096 in bfloat16.

    python -m benchmarks.speed_gpu --output benchmarks/results/speed_gpu.json

As in `benchmarks.speed`, figures are medians of calls taken in turns, as they are called: launching
kernels counts. The dense layer's weights, read between two calls of the head, leave nothing of it
in cache. The loss is forward and backward of the mean cross-entropy, with the most memory that one
call takes beside weights and hidden states.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig

from hf_vqlogits import VQLogitsConfig, VQLogitsHead
from hf_vqlogits.conversion.sizes import DEFAULT_FINE_SHARE
from hf_vqlogits.conversion.timing import paired_medians

from .record import record, write

VOCAB_SIZE, HIDDEN_SIZE = 128_256, 4096
FINE_TOKENS = int(DEFAULT_FINE_SHARE * VOCAB_SIZE)
REDUCTIONS = {0.99: 1282, 0.98: 2564}  # share saved: bits a token
ROWS = (1, 64)
LOSS_ROWS = 8192


def make_head(bits: int, device: torch.device) -> VQLogitsHead:
    """A random head in bfloat16."""
    config = LlamaConfig(vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE)
    head = VQLogitsHead(
        VQLogitsConfig(text_config=config, num_codebooks=bits, num_fine_tokens=FINE_TOKENS)
    )
    return head.to(device, torch.bfloat16)


@torch.no_grad()
def measure_logits(head: VQLogitsHead, weight: Tensor, rows: int) -> dict[str, Any]:
    """Median milliseconds and their ratio, for so many rows."""
    hidden = torch.randn(rows, HIDDEN_SIZE, device=weight.device, dtype=weight.dtype)
    layers: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: hidden @ weight.T,
        "quantised": lambda: head(hidden),
    }
    return {"rows": rows, "bits": head.num_codebooks, **_times(layers, weight.device)}


def measure_loss(head: VQLogitsHead, weight: Tensor, rows: int) -> dict[str, Any]:
    """Median milliseconds, their ratio and bytes, of forward and backward for so many rows."""
    hidden = torch.randn(rows, HIDDEN_SIZE, device=weight.device, dtype=weight.dtype)
    labels = torch.randint(0, VOCAB_SIZE, (rows,), device=weight.device)
    weight = weight.detach().requires_grad_()
    hidden.requires_grad_()

    def gradients(loss: Tensor, parameter: Tensor) -> Tensor:
        return torch.autograd.grad(loss, (hidden, parameter))[0]

    layers: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: gradients(
            functional.cross_entropy((hidden @ weight.T).float(), labels), weight
        ),
        "quantised": lambda: gradients(head(hidden, labels), head.codebook),
    }
    memory = {}
    for name, call in layers.items():
        call()
        torch.cuda.reset_peak_memory_stats(weight.device)
        before = torch.cuda.memory_allocated(weight.device)
        call()
        memory[name] = torch.cuda.max_memory_allocated(weight.device) - before
    times = _times(layers, weight.device)
    return {"rows": rows, "bits": head.num_codebooks, "bytes": memory, **times}


def _times(layers: dict[str, Callable[[], Tensor]], device: torch.device) -> dict[str, Any]:
    seconds = paired_medians(layers, device)
    return {
        "milliseconds": {name: value * 1e3 for name, value in seconds.items()},
        "times_faster": seconds["dense"] / seconds["quantised"],
    }


def main() -> None:
    """Measure and write the results."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, required=True)
    options = p.parse_args()
    if not torch.cuda.is_available():
        p.error("there is no GPU, of which this benchmark is; `benchmarks.speed` is of processors")
    torch.manual_seed(options.seed)
    device = torch.device("cuda", torch.cuda.current_device())
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, device=device, dtype=torch.bfloat16) * 0.02
    logits, losses = [], []
    for bits in REDUCTIONS.values():
        head = make_head(bits, device)
        logits += [measure_logits(head, weight, rows) for rows in ROWS]
        losses.append(measure_loss(head, weight, LOSS_ROWS))
    result = record(
        "speed_gpu",
        "triton",
        gpu=torch.cuda.get_device_name(device),
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        fine_tokens=FINE_TOKENS,
        seed=options.seed,
        logits=logits,
        losses=losses,
    )
    write(result, options.output)
    for name, rows in (("logits", logits), ("loss", losses)):
        for row in rows:
            print(
                f"{name}, N = {row['rows']:4}, R = {row['bits']:4}: "
                f"{row['milliseconds']['quantised']:.3f} ms, {row['times_faster']:.1f}x faster"
            )


if __name__ == "__main__":
    main()
