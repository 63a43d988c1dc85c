"""Times of calls with what they read in the caches, and without."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from hf_vqlogits.conversion.timing import paired_medians

WARM_CALLS = 5
OTHER_BYTES = 512 << 20
TEMPERATURES = ("warm", "cold")

Seconds: TypeAlias = dict[str, dict[str, float]]


def warm_and_cold(calls: dict[str, Callable[[], Tensor]]) -> Seconds:
    """Median seconds on the CPU, the calls taken in turns.

    Returns:
        By name, `warm`: each after `WARM_CALLS` of its own, so that the caches hold what fits in
        them; and `cold`: after `OTHER_BYTES` of other memory was read, as in `generate` the rest
        of the model is.
    """
    device, other = torch.device("cpu"), torch.zeros(OTHER_BYTES // 4)
    return {
        "warm": paired_medians(calls, device, lambda call: [call() for _ in range(WARM_CALLS)]),
        "cold": paired_medians(calls, device, lambda call: other.sum()),
    }
