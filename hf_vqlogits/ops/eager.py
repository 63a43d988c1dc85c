"""The specification of the operations, in eager PyTorch.

Letters: N rows, V vocabulary, G codebooks (R for sign codes), K codewords.

    sign codes    logits[n, v] = sum_r s[v, r] * scores[n, r],  s[v, r] = +1 or -1
    index codes   logits[n, v] = sum_g scores[n, g, codes[v, g]]

with scores = scale (hidden . codebook + codebook_bias), the one product with hidden states.

Some tokens may have a second sign code s', the fine one, which names the same codewords at a
fraction of their length: their s[v, r] is s[v, r] + `FINE_FACTOR` s'[v, r].

Bit r of token v is `(codes[v, r // 8] >> (r % 8)) & 1`; 1 stands for +1, and bits above R are 0.
Everything here works on any device and in any floating-point type; sums of bfloat16 and float16
scores are taken in float32 and rounded once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of the piece of the +-1 matrix that exists at a time. It is written and read once, so it
# should stay in a core's cache: gradient of 64 rows, V 50,257, R 1,000, 2 cores: 65 ms in pieces of
# 1 MB, 54 ms in 4 MB, 57 ms in 16 MB.
_PIECE_BYTES = 4 << 20

CODE_TYPES = ("sign", "index")

# A half makes of two signs the four levels of a uniform quantiser, +-1/2 and +-3/2. On
# SmolLM2-135M at 99%, perplexity factor with 0.5 and 0.6: 1.225, 1.231.
FINE_FACTOR = 0.5


def pack_signs(signs: Tensor) -> Tensor:
    """Pack signs into bits, eight a byte, the first in the lowest bit.

    Args:
        signs: bool (True is +1) or numbers that are all +1 or -1, (..., R).

    Returns:
        uint8 codes (..., ceil(R / 8)); bits above R are 0.

    Raises:
        ValueError: there are no signs to pack, or a number is neither +1 nor -1.
    """
    if signs.dim() == 0 or signs.shape[-1] == 0:
        raise ValueError(
            f"`signs` has shape {tuple(signs.shape)}; its last dimension must hold R >= 1 signs."
        )
    if signs.dtype is not torch.bool:
        if not bool(((signs == 1) | (signs == -1)).all()):
            raise ValueError(
                "`signs` holds a number that is neither +1 nor -1; compare first, as in "
                "`signs > 0`, to say what becomes of the others."
            )
        signs = signs > 0
    width = -(-signs.shape[-1] // 8)
    codes = torch.zeros(*signs.shape[:-1], width, dtype=torch.uint8, device=signs.device)
    for bit in range(min(8, signs.shape[-1])):
        column = signs[..., bit::8].to(torch.uint8) << bit
        codes[..., : column.shape[-1]] |= column
    return codes


def unpack_signs(
    codes: Tensor, num_codebooks: int, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Write out the +-1 matrix that packed signs stand for.

    Args:
        codes: uint8 (..., ceil(R / 8)).
        num_codebooks: R.
        dtype: of the result.

    Returns:
        +1 and -1, (..., R).

    Raises:
        ValueError: `codes` is not as wide as R signs need.
    """
    width = -(-num_codebooks // 8)
    if num_codebooks < 1 or codes.dim() == 0 or codes.shape[-1] != width:
        raise ValueError(
            f"`codes` has shape {tuple(codes.shape)}, but {num_codebooks} signs a token "
            f"(`num_codebooks`, at least 1) make a last dimension of {width} bytes."
        )
    # Looking eight signs up a byte writes the result once; to shift out bit after bit takes several
    # passes over it.
    signs = _signs_of_bytes(dtype, codes.device).index_select(0, codes.flatten().int())
    return signs.view(*codes.shape[:-1], 8 * width)[..., :num_codebooks]


def scores(hidden: Tensor, codebook: Tensor, codebook_bias: Tensor, *, scale: float) -> Tensor:
    """Scores of the codewords: `scale * linear(hidden, codebook, codebook_bias)`.

    Scaled within the product, before it is rounded: unscaled, float16 could overflow. (That is the
    forward pass; gradients in float16 are scaled after their products.)

    Args:
        hidden: (N, d).
        codebook: (R, d), or (G, K, d).
        codebook_bias: (R,), or (G, K).
        scale: factor on every score.

    Returns:
        (N, R), or (N, G, K).
    """
    words = codebook.flatten(0, -2).T
    flat = torch.addmm(codebook_bias.flatten(), hidden, words, beta=scale, alpha=scale)
    return flat.view(-1, *codebook_bias.shape)


def final_logits(raw: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """What a family makes of raw logits (...): scaled, then c tanh(z / c); c None leaves them."""
    if logit_scale != 1.0:
        raw = raw * logit_scale
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def expand(
    scores: Tensor,
    codes: Tensor,
    code_type: str,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
) -> Tensor:
    """Logits (N, V) of scores (N, R) or (N, G, K): the equations above."""
    if code_type != "sign":
        return _expand_indices(scores, codes)
    if fine_ids is None or fine_codes is None:
        return _expand_signs(scores, codes)
    exact = scores.to(sum_dtype(scores.dtype))  # two sums, to be rounded once
    logits, fine_logits = _expand_signs(exact, codes), _expand_signs(exact, fine_codes)
    return add_fine_(logits, fine_logits, fine_ids).to(scores.dtype)


def expand_backward(grad: Tensor, codes: Tensor, code_type: str, shape: tuple[int, ...]) -> Tensor:
    """Gradient of [`expand`] with respect to scores of the given shape, from that of the logits."""
    if code_type == "sign":
        return _expand_signs_backward(grad, codes, shape[1])
    return _expand_indices_backward(grad, codes, shape[1], shape[2])


def gather_rows(
    codes: Tensor,
    ids: Tensor,
    codebook: Tensor,
    scale: float,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
) -> Tensor:
    """Rows (N, d) of the tokens `ids` (N,): `scale * S[ids] @ codebook`, S the matrix of signs.

    Where `fine_ids` (F,), ascending, names a token, half of its signs in `fine_codes` is in S too.
    """
    rows = codebook.new_empty(len(ids), codebook.shape[1])
    unused = codebook.new_zeros(())
    fine = (fine_ids, fine_codes)
    for some, signs in _pieces_of_rows(codes, ids, len(codebook), codebook.dtype, *fine):
        # Scaled within the product, before it is rounded: unscaled, float16 could overflow.
        rows[some] = torch.addmm(unused, signs, codebook, beta=0, alpha=scale)
    return rows


def gather_rows_backward(
    grad: Tensor,
    codes: Tensor,
    ids: Tensor,
    num_codebooks: int,
    scale: float,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
) -> Tensor:
    """Gradient (R, d) of [`gather_rows`] with respect to the codebook, from that of the rows."""
    exact = grad.to(sum_dtype(grad.dtype))
    sums = exact.new_zeros(num_codebooks, grad.shape[1])
    fine = (fine_ids, fine_codes)
    for some, signs in _pieces_of_rows(codes, ids, num_codebooks, exact.dtype, *fine):
        sums.addmm_(signs.T, exact[some], alpha=scale)
    return sums.to(grad.dtype)


def add_fine_(logits: Tensor, fine_logits: Tensor, fine_ids: Tensor) -> Tensor:
    """Add what the second codes give, in place.

    Args:
        logits: (N, V) of the first codes.
        fine_logits: (N, F), the scores summed by the second codes.
        fine_ids: (F,), the tokens that have them, each once.

    Returns:
        `logits`.
    """
    # Not `index_add_`, which loops over the tokens with a microsecond for each.
    index = fine_ids.long().expand(len(logits), -1)
    return logits.scatter_add_(1, index, fine_logits * FINE_FACTOR)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which scores of type `dtype` are summed."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _expand_signs(scores: Tensor, codes: Tensor) -> Tensor:
    exact = scores.to(sum_dtype(scores.dtype))
    logits = scores.new_empty(scores.shape[0], codes.shape[0])
    for tokens, signs in _pieces(codes, scores.shape[1], exact.dtype):
        logits[:, tokens] = exact @ signs.T  # (N, R) @ (R, tokens)
    return logits


def _expand_signs_backward(grad: Tensor, codes: Tensor, num_codebooks: int) -> Tensor:
    exact = grad.to(sum_dtype(grad.dtype))
    sums = exact.new_zeros(grad.shape[0], num_codebooks)
    for tokens, signs in _pieces(codes, num_codebooks, exact.dtype):
        sums.addmm_(exact[:, tokens], signs)  # (N, tokens) @ (tokens, R)
    return sums.to(grad.dtype)


def _expand_indices(scores: Tensor, codes: Tensor) -> Tensor:
    exact = scores.to(sum_dtype(scores.dtype))
    logits = exact[:, 0].index_select(1, codes[:, 0].int())  # (N, K) -> (N, V)
    for g in range(1, codes.shape[1]):
        logits += exact[:, g].index_select(1, codes[:, g].int())
    return logits.to(scores.dtype)


def _expand_indices_backward(
    grad: Tensor, codes: Tensor, num_codebooks: int, codebook_size: int
) -> Tensor:
    exact = grad.to(sum_dtype(grad.dtype))
    sums = exact.new_zeros(grad.shape[0], num_codebooks, codebook_size)
    for g in range(num_codebooks):
        index = codes[:, g].long().expand(grad.shape[0], -1)  # (N, V), without copies of the V
        sums[:, g].scatter_add_(1, index, exact)
    return sums.to(grad.dtype)


def _pieces(
    codes: Tensor, num_codebooks: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of the +-1 matrix (V, R), which as a whole is as large as a dense layer."""
    step = max(1, _PIECE_BYTES // (num_codebooks * dtype.itemsize))
    for begin in range(0, codes.shape[0], step):
        tokens = slice(begin, begin + step)
        yield tokens, unpack_signs(codes[tokens], num_codebooks, dtype=dtype)


def _pieces_of_rows(
    codes: Tensor,
    ids: Tensor,
    num_codebooks: int,
    dtype: torch.dtype,
    fine_ids: Tensor | None,
    fine_codes: Tensor | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of the matrix (N, R) of the tokens' signs and halves of their second ones."""
    for some, signs in _pieces(codes.index_select(0, ids), num_codebooks, dtype):
        if fine_ids is not None and fine_codes is not None and len(fine_ids):
            tokens = ids[some]
            place = torch.searchsorted(fine_ids.to(tokens.dtype), tokens)
            place = place.clamp_(max=len(fine_ids) - 1)
            has_one = (fine_ids[place] == tokens).to(dtype).unsqueeze(1)
            # For all tokens, those without one too: to count the others would wait for a GPU. The
            # sums +-1/2 and +-3/2 are exact in every type, so that a row is rounded once.
            fine = unpack_signs(fine_codes[place], num_codebooks, dtype=dtype)
            signs.addcmul_(has_one, fine, value=FINE_FACTOR)
        yield some, signs


def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs of each byte, (256, 8)."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return (2 * (bits & 1) - 1).to(dtype)
