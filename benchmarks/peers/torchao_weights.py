"""torchao: integers weight-only, by its own call on an `nn.Linear`.

Its packed 4-bit layout asks for an accelerator; on the CPU the same integers come from its
`IntxWeightOnlyConfig`, which keeps each in a byte. Counted are the 4 bits that they need.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .layer import Compressed, UnavailableError, packed_bytes


def torchao_weights(weight: Tensor, bits: int, *, group: int | None = None) -> Compressed:
    """Integers of 8 bits with a scale a row, or of 4 with scale and zero point a group.

    Args:
        weight: (V, d); rounded to bfloat16 first, as in a model loaded for it.
        bits: 8 or 4.
        group: columns that share a scale, for 4 bits.

    Raises:
        UnavailableError: no torchao.
    """
    try:
        from torchao.quantization import (
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            MappingType,
            PerGroup,
            quantize_,
        )
    except ImportError as error:
        raise UnavailableError(f"torchao cannot be imported: {error}") from error
    vocab_size, size = weight.shape
    linear = nn.Linear(size, vocab_size, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(weight)
    holder = nn.Sequential(linear)  # quantize_ looks for layers inside of a module
    if group is None:
        quantize_(holder, Int8WeightOnlyConfig())
    else:
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(group),
            mapping_type=MappingType.ASYMMETRIC,
        )
        quantize_(holder, config)
    quantised: Any = linear.weight
    scale = quantised.scale.float()
    codes = quantised.qdata.float().unflatten(1, (scale.shape[1], -1))
    total = packed_bytes(codes.numel(), bits) + scale.numel() * quantised.scale.element_size()
    if group is not None:
        codes -= quantised.zero_point.float()[..., None]
        total += packed_bytes(quantised.zero_point.numel(), bits)
    # Its own `dequantize` would round to bfloat16 once more.
    return Compressed((codes * scale[..., None]).flatten(1), total)
