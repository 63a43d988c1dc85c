"""In which type large products of training are taken."""

import torch


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32.

    On a processor without matrix instructions a product in bfloat16 was 26 times slower than one in
    float32; with them (AMX) it is several times faster.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
        fast = device.type == "cpu" and supported is not None and supported()
    return torch.bfloat16 if fast else torch.float32
