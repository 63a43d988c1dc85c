"""Logits straight from hidden states, in one call where that is faster.

With few rows, as in decoding, the arithmetic takes less time than its preparation: the product that
makes the scores, its threads and PyTorch's dispatch of two operations. So where nothing needs a
gradient and nobody traces, the compiled kernel makes the scores as well, on the threads that use
them.
"""

import torch
from torch import Tensor, nn

from . import backends, cpu
from .eager import scores
from .registration import expand

# Above this many rows the product of a matrix library wins back what the start of it costs.
LARGEST_ROWS = 4


def logits(
    hidden: Tensor,
    *,
    codebook: Tensor,
    codebook_bias: Tensor,
    codes: Tensor,
    code_type: str,
    scale: float,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
) -> Tensor:
    """Logits of hidden states: [`expand`] of their [`scores`].

    Args:
        hidden: (N, d).
        codebook: (R, d), or (G, K, d).
        codebook_bias: (R,), or (G, K).
        codes: as in [`expand`].
        code_type: `"sign"` or `"index"`.
        scale: factor on every score.
        fine_ids: as in [`expand`].
        fine_codes: as in [`expand`].

    Returns:
        (N, V). In one call, scores of bfloat16 are not rounded before they are summed.
    """
    path = _path(hidden, codebook, codebook_bias, codes, code_type)
    if path is not None:
        return cpu.logits(
            hidden, codebook, codebook_bias, codes, code_type, scale, path, fine_ids, fine_codes
        )
    return expand(
        scores(hidden, codebook, codebook_bias, scale=scale),
        codes,
        code_type=code_type,
        fine_ids=fine_ids,
        fine_codes=fine_codes,
    )


def _path(
    hidden: Tensor, codebook: Tensor, codebook_bias: Tensor, codes: Tensor, code_type: str
) -> str | None:
    """The path of the kernel that can and may do it in one call, or None."""
    floats = (hidden, codebook, codebook_bias)
    if (
        torch.compiler.is_compiling()
        or not 0 < len(hidden) <= LARGEST_ROWS
        or hidden.dtype not in cpu.SCORED_TYPES
        or any(t.dtype != hidden.dtype or t.device.type != "cpu" for t in floats)
        # Subclasses (of FSDP, of quantisation, of tracing) do with an operation what they must.
        or any(type(t) not in (Tensor, nn.Parameter) for t in (*floats, codes))
        or (torch.is_grad_enabled() and any(t.requires_grad for t in floats))
        or torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()
    ):
        return None
    requested = backends.requested()
    shape = codebook_bias.shape
    for path in cpu.paths():
        if path in cpu.SCORING_PATHS and requested in ("auto", "cpu", path):
            return path if cpu.knows(path, codes, code_type, shape[-1]) else None
    return None
