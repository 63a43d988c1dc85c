"""Logits straight from hidden states, in one call where that is faster.

With few rows, as in decoding, the arithmetic takes less time than its preparation: the product that
makes the scores, its threads and PyTorch's dispatch of two operations. So where nothing needs a
gradient and nobody traces, the compiled kernel makes the scores as well, on the threads that use
them.
"""

import torch
from torch import Tensor

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
    dtype: torch.dtype | None = None,
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
        dtype: of the logits; default that of `hidden`.

    Returns:
        (N, V). In one call, scores of half precision are not rounded before they are summed.
    """
    path = _path(hidden, codebook, codebook_bias, codes, code_type)
    # What does not go together, the other way refuses.
    if path is not None and _go_together(
        hidden, codebook, codebook_bias, codes, code_type, fine_ids, fine_codes
    ):
        own = (hidden, codebook, codebook_bias, codes, code_type, scale, path)
        return cpu.logits(*own, fine_ids, fine_codes, dtype)
    made = scores(hidden, codebook, codebook_bias, scale=scale)
    return expand(
        made if dtype is None else made.to(dtype),
        codes,
        code_type=code_type,
        fine_ids=fine_ids,
        fine_codes=fine_codes,
    )


def _go_together(
    hidden: Tensor,
    codebook: Tensor,
    codebook_bias: Tensor,
    codes: Tensor,
    code_type: str,
    fine_ids: Tensor | None,
    fine_codes: Tensor | None,
) -> bool:
    """Whether no tensor is shorter than the others say, or of another type."""
    shape, sign = codebook_bias.shape, code_type == "sign"
    width = (shape[0] + 7) // 8 if sign else shape[0]
    if (
        codebook.shape != (*shape, hidden.shape[1])
        or len(shape) != (1 if sign else 2)
        or codes.dim() != 2
        or codes.shape[1] != width
        or (codes.dtype is not torch.uint8 and (sign or codes.dtype is not torch.int32))
    ):
        return False
    if fine_ids is None or fine_codes is None:
        return fine_ids is fine_codes
    return sign and fine_codes.dtype is torch.uint8 and fine_codes.shape == (len(fine_ids), width)


def _path(
    hidden: Tensor, codebook: Tensor, codebook_bias: Tensor, codes: Tensor, code_type: str
) -> str | None:
    """The path of the kernel that can and may do it in one call, or None."""
    floats = (hidden, codebook, codebook_bias)
    if (
        not backends.callable_directly(*floats, codes)
        or not 0 < len(hidden) <= LARGEST_ROWS
        or hidden.dtype not in cpu.TYPES
        or any(t.dtype != hidden.dtype for t in floats)
    ):
        return None
    requested = backends.requested()
    shape = codebook_bias.shape
    for path in cpu.paths():
        if path in cpu.SCORING_PATHS and requested in ("auto", "cpu", path):
            return path if cpu.knows(path, codes, code_type, shape[-1]) else None
    return None
