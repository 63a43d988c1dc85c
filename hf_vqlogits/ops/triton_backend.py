"""Whether the Triton kernels can be used, which is found out once for each device."""

import functools
import logging
import subprocess

import torch
from torch import Tensor

from .tensor_cache import TensorCache

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)  # the first with products of bfloat16


def supports(scores: Tensor, codes: Tensor) -> bool:
    """Whether the kernels know such scores (or gradients) and codes, and work on their device."""
    # A layout that may no longer match its codes is worse than a slower path.
    known = scores.dtype in _DTYPES and TensorCache.can_hold(codes)
    return known and usable(scores.device)


def usable(device: torch.device) -> bool:
    """Whether the kernels work on a device; if not on a GPU, it is said why, once.

    On a CPU they work where Triton's interpreter was switched on (`TRITON_INTERPRET=1`) before the
    first use, which is for tests.
    """
    return obstacle(device) is None


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why the kernels do not work on a device; None where they do."""
    reason = _find_obstacle(device)
    if reason is not None and device.type == "cuda":
        _warn(reason)
    return reason


@functools.cache
def _warn(reason: str) -> None:
    logger.warning(
        "The Triton kernels of hf_vqlogits are not used: %s. PyTorch operations take their place, "
        "which need more memory.",
        reason,
    )


def _find_obstacle(device: torch.device) -> str | None:
    try:
        # Not above: without Triton, this module and all that import it must load.
        from triton.errors import TritonError

        from . import triton_expand, triton_tiles
    except ImportError as error:
        return f"{error}; `pip install '.[gpu]'` in the project's folder installs what is missing"
    if device.type != "cuda":
        if device.type == "cpu" and triton_tiles.INTERPRETED:
            return None
        return f"they run on GPUs, not on {device}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            return f"they take a GPU of compute capability 8.0 or more, not {capability}"
    # Kernels are compiled when first called, for which a machine may lack a C compiler or a driver.
    try:
        codes = torch.full((1, 1), 255, dtype=torch.uint8, device=device)
        for rows in (1, triton_expand.FEW_ROWS + 1):
            scores = torch.ones(rows, 8, dtype=torch.bfloat16, device=device)
            if not bool((triton_expand.expand(scores, codes, "sign") == 8).all()):
                return "the sum of eight ones came out wrong"
    except (TritonError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return None
