"""HQQ: half-quadratic quantisation, by its authors' package.

Badri and Shaji (2023), "Half-quadratic quantization of large machine learning models".
"""

import torch
from torch import Tensor

from .grid import GROUP
from .layer import HALF, Compressed, UnavailableError, packed_bytes, through


def hqq_weights(weight: Tensor, bits: int, *, group: int = GROUP) -> Compressed:
    """Integers with a scale and a zero point a group, both floats of 16 bits (its default).

    Args:
        weight: (V, d).
        bits: 2 or 4.
        group: columns that share them.

    Raises:
        UnavailableError: no hqq.
    """
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise UnavailableError(f"hqq cannot be imported: {error}") from error
    codes, meta = Quantizer.quantize(
        weight.float().clone(),
        nbits=bits,
        group_size=group,
        axis=1,
        channel_wise=True,
        optimize=True,
        device="cpu",
        compute_dtype=torch.float32,
    )
    for name in ("scale", "zero"):
        meta[name] = through(meta[name], torch.float16)
    count = meta["scale"].numel()
    return Compressed(
        Quantizer.dequantize(codes, meta).float(),
        packed_bytes(weight.numel(), bits) + 2 * HALF * count,
    )
