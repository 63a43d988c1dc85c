"""The largest logits of every row, without the N x V logits."""

import torch
from torch import Tensor

from . import backends, cpu
from .eager import scores as make_scores
from .registration import check, expand

CHUNK_BYTES = 64 << 20  # of logits that exist at a time, where no kernel finds the largest


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
        Logits in float32, descending, and tokens int64, both (N, k). The compiled kernel takes the
        first of equal tokens; where a row has NaN instead of numbers it gives NaN of token 0.

    Raises:
        ValueError: k is not in 1..V, or as [`expand`].
    """
    vocabulary = codes.shape[0]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"`k` must be in 1..{vocabulary}, the vocabulary, got {k}.")
    values = torch.empty(len(hidden), k, device=hidden.device)
    tokens = torch.empty(len(hidden), k, dtype=torch.long, device=hidden.device)
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    for some, into_values, into_tokens in zip(
        hidden.split(rows), values.split(rows), tokens.split(rows), strict=True
    ):
        scores = make_scores(some, codebook, codebook_bias, scale=scale)
        check(scores, codes, code_type, fine_ids, fine_codes)
        path = backends.for_expand(scores, codes, code_type)
        if path in cpu.LARGEST_CODEBOOKS:
            found = cpu.topk(scores, k, codes, code_type, path, fine_ids, fine_codes)
        else:
            scores = scores.float()
            logits = expand(
                scores, codes, code_type=code_type, fine_ids=fine_ids, fine_codes=fine_codes
            )
            found = torch.topk(logits, k)
        into_values.copy_(found[0])
        into_tokens.copy_(found[1])
    return values, tokens
