"""How long the logits of one row take, in the dense layer and in the quantised one."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

REPEATS = 21
WARM_UP = 3


def paired_medians(
    layers: dict[str, Callable[[], Tensor]],
    device: torch.device,
    prepare: Callable[[Callable[[], Tensor]], object] = lambda call: None,
    *,
    repeats: int | None = None,
) -> dict[str, float]:
    """Median seconds of each call, taken in turns so that a drift of the machine hits all alike.

    Args:
        layers: what to time, by name.
        device: where it runs; a GPU is waited for.
        prepare: called with each call before it, outside the time taken: to fill the caches with
            what it reads, or with something else. Without it, each call finds what the other
            layers left there.
        repeats: calls that count; default `REPEATS`.

    Returns:
        Seconds a call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range((repeats or REPEATS) + WARM_UP):
        for name, call in layers.items():
            prepare(call)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


@torch.no_grad()
def logit_times(
    weight: Tensor,
    bias: Tensor | None,
    head: torch.nn.Module,
    also: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, float]:
    """Seconds for the logits of one row.

    Args:
        weight: dense output weight (V, d).
        bias: (V,) or None.
        head: the quantised head.
        also: others to be timed, by name, on hidden states in the head's type.

    Returns:
        `dense_float32`, `dense_bfloat16`, `quantised` and the others, each from hidden states in
        the layer's own type.
    """
    device = weight.device
    hidden = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(device)
    layers: dict[str, Callable[[], Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        own_bias = None if bias is None else bias.to(dtype)
        tensors = (hidden.to(dtype), weight.to(dtype), own_bias)
        name = f"dense_{str(dtype).removeprefix('torch.')}"
        layers[name] = partial(torch.nn.functional.linear, *tensors)
    own = hidden.to(next(head.parameters()).dtype)
    layers["quantised"] = partial(head, own)
    layers |= {name: partial(layer, own) for name, layer in (also or {}).items()}
    return paired_medians(layers, device)
