"""bitsandbytes: 4-bit NormalFloat, by its own calls.

Dettmers, Pagnoni, Holtzman and Zettlemoyer (2023), "QLoRA: Efficient finetuning of quantized LLMs".
"""

from typing import Any

from torch import Tensor

from .layer import Compressed, UnavailableError


def nf4_weights(weight: Tensor, *, nested: bool, block: int = 64) -> Compressed:
    """The 16 quantiles of a normal distribution, times a scale a block.

    Args:
        weight: (V, d).
        nested: quantise the scales too ("double quantisation").
        block: weights that share a scale.

    Raises:
        UnavailableError: no bitsandbytes.
    """
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UnavailableError(f"bitsandbytes cannot be imported: {error}") from error
    codes, state = functional.quantize_4bit(
        weight.float().contiguous(), blocksize=block, quant_type="nf4", compress_statistics=nested
    )
    # The 16 quantiles are constants of the program; the levels of nested scales are as well.
    stored: list[Any] = [codes, state.absmax]
    if nested:
        stored += [state.state2.absmax, state.offset]
    return Compressed(
        functional.dequantize_4bit(codes, state).view_as(weight).float(),
        sum(tensor.numel() * tensor.element_size() for tensor in stored),
    )
