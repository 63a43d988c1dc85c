"""In which type large products are taken that need not be exact."""

import torch


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32.

    Beside float32 a product in bfloat16 was several times faster on a processor with matrix
    instructions (AMX), 2.2 times with dot products of pairs alone (AVX-512 BF16), and 26 times
    slower with neither.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # AMX implies it
    return torch.bfloat16 if fast else torch.float32
