"""The baseline: every row in bfloat16."""

import torch
from torch import Tensor

from .layer import HALF, Compressed, through


def bfloat16(weight: Tensor) -> Compressed:
    """The dense layer (V, d) in bfloat16."""
    return Compressed(through(weight, torch.bfloat16), HALF * weight.numel())
