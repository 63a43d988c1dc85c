"""The largest logits of every row: without the N x V logits, or of those that are there.

The latter is an operation for PyTorch, `torch.ops.vqlogits.largest(logits, k) -> values, tokens`.
"""

import torch
from torch import Tensor

from . import backends, cpu, direct
from .registration import LIBRARY, TAGS

# Of logits that exist at a time: more than 32 MB would come from the system with every chunk (see
# csrc/pages.h).
CHUNK_BYTES = 30 << 20
LIBRARY.define("largest(Tensor logits, int k) -> (Tensor, Tensor)", tags=TAGS)


@torch.no_grad()
def topk(
    hidden: Tensor,
    k: int,
    *,
    codebook: Tensor,
    codebook_bias: Tensor,
    codes: Tensor,
    code_type: str,
    scale: float,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest logits of every row and their tokens; without gradient.

    Equivalent to `torch.topk(logits, k)` of the logits of [`logits`], which are never all there.

    Args:
        hidden: (N, d).
        k: 1 to V.
        codebook: (R, d), or (G, K, d).
        codebook_bias: (R,), or (G, K).
        codes: as in [`expand`].
        code_type: `"sign"` or `"index"`.
        scale: factor on every score.
        fine_ids: as in [`expand`].
        fine_codes: as in [`expand`].

    Returns:
        Logits in float32, descending, and tokens int64, both (N, k). The compiled library takes the
        first of equal tokens; where a row has NaN instead of numbers it gives NaN of token 0.

    Raises:
        ValueError: k is not in 1..V, or as [`expand`].
    """
    vocabulary = codes.shape[0]
    check_k(k, vocabulary)
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    found = [
        largest(
            direct.logits(
                some,
                codebook=codebook,
                codebook_bias=codebook_bias,
                codes=codes,
                code_type=code_type,
                scale=scale,
                fine_ids=fine_ids,
                fine_codes=fine_codes,
                dtype=torch.float32,
            ),
            k,
        )
        for some in hidden.split(rows)
    ]
    values, tokens = zip(*found, strict=True)
    return torch.cat(values), torch.cat(tokens)


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of logits and their tokens, as `torch.topk(logits, k)`; without gradient.

    On the CPU by the compiled library, a row a core: of 49,152 logits the 64 largest take 0.02 ms
    where `torch.topk` takes 0.14.

    Args:
        logits: (..., V).
        k: 1 to V.

    Returns:
        Values, descending, and tokens int64, both (..., k). NaN and equal logits as [`topk`].

    Raises:
        ValueError: k is not in 1..V.
    """
    check_k(k, logits.shape[-1])
    logits = logits.detach()
    kind = type(logits), logits.device.type
    if kind != (Tensor, "cpu") or logits.dtype not in cpu.TYPES:
        return torch.topk(logits, k)
    found: tuple[Tensor, Tensor] = torch.ops.vqlogits.largest.default(logits, k)
    return found


def check_k(k: int, vocabulary: int) -> None:
    """Raise a ValueError where V logits have no k largest."""
    if not 1 <= k <= vocabulary:
        raise ValueError(f"`k` must be in 1..{vocabulary}, the vocabulary, got {k}.")


def _compute_largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_k(k, logits.shape[-1])
    if not backends.may_use_library():
        return torch.topk(logits, k)
    values, tokens = cpu.largest(logits.reshape(-1, logits.shape[-1]), k)
    shape = (*logits.shape[:-1], k)
    return values.view(shape), tokens.view(shape)


def _shape_of_largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.long)


LIBRARY.impl("largest", _compute_largest, "CPU")
torch.library.register_fake("vqlogits::largest", _shape_of_largest, lib=LIBRARY)
