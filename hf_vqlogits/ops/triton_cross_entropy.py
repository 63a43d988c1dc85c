"""Cross-entropy of sign codes on a GPU without the N x V logits, in Triton.

    z[n, v] = softcap(scale sum_r s[v, r] scores[n, r])
    loss[n] = lse[n] - (1 - e) z[n, label[n]] - e mean_v z[n, v] + q lse[n]^2,  lse = logsumexp_v z

with the label smoothing e and the weight q of the z-loss (ST-MoE, arXiv 2202.08906). Two kernels:

    loss       a program takes a tile of rows and a piece of the vocabulary, makes the logits of one
               tile of tokens after another in registers and reduces them at once: largest logit,
               sum of exponentials relative to it (online softmax, arXiv 1805.02867), sum of the
               logits, logit of the label. What the pieces found is joined afterwards.
    gradient   makes the same tiles again, turns each into d loss / d z, which with the logsumexp
               needs no other tile, and adds its product with the tile's signs to d loss / d scores.

Memory is O(N R): each piece of the vocabulary has sums of its own, at most `PROGRAMS` tiles of rows
altogether, which are added in a fixed order: the same input gives the same bits. The gradients of
codebook and hidden states are dense products, which PyTorch takes from that of the scores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_layout import sign_layout
from .triton_tiles import (
    BLOCK_V,
    add_split_product,
    logits_tile,
    pieces_of_vocabulary,
    rows_of_a_tile,
    sign_tile,
    tile_arguments,
)

_LARGEST_BLOCK = 64


def losses_and_gradient(
    scores: Tensor,
    codes: Tensor,
    fine_ids: Tensor | None,
    fine_codes: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float,
    logit_scale: float,
    softcap: float | None,
    z_loss: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses of rows that all count, and the gradient of each in its row of scores.

    Args:
        scores: (N, R), float32, bfloat16 or float16.
        codes: sign codes uint8 (V, ceil(R / 8)).
        fine_ids: (F,), tokens with a second sign code, each once; or None.
        fine_codes: uint8 (F, ceil(R / 8)), those codes; they count half.
        labels: int64 (N,), each in 0..V-1.
        label_smoothing: e.
        logit_scale: factor on every logit.
        softcap: c of softcap(x) = c tanh(x / c), or None.
        z_loss: q.
        with_gradient: whether to compute the gradient.

    Returns:
        Losses float32 (N,), and (N, R) in the type of the scores or None. Logits are as exact as
        `triton_expand.expand` makes them. d loss / d z goes into the product with 16 binary digits
        for bfloat16 and float16 scores, with all 24 for float32.

    Raises:
        IndexError: one of `fine_ids` lies outside 0..V-1.
        ValueError: `fine_ids` names a token twice.
    """
    rows, num_codebooks = scores.shape
    vocabulary = codes.shape[0]
    layout = sign_layout(codes, fine_ids, fine_codes)
    places = layout.columns[labels] if layout.num_fine else labels
    block_n = rows_of_a_tile(rows, _LARGEST_BLOCK)
    blocks = triton.cdiv(rows, block_n)
    pieces, tiles_a_piece = pieces_of_vocabulary(vocabulary, BLOCK_V, blocks)
    arguments = tile_arguments(scores, layout, block_n) | {
        "tiles_a_piece": tiles_a_piece,
        "rows": rows,
        "vocabulary": vocabulary,
        "scale": float(logit_scale),
        "cap": float(softcap or 1.0),
        "CAPPED": softcap is not None,
    }
    found = scores.new_empty(4, pieces, rows, dtype=torch.float32)
    with torch.cuda.device_of(scores):
        _loss_kernel[(blocks, pieces)](places, found, found.stride(0), **arguments)
    largest, total, sum_of_logits, of_label = found
    logsumexp = (largest + total.log()).logsumexp(0)
    losses = logsumexp - (1 - label_smoothing) * of_label.sum(0)
    if label_smoothing:
        losses -= label_smoothing / vocabulary * sum_of_logits.sum(0)
    if z_loss:
        losses += z_loss * logsumexp.square()
    if not with_gradient:
        return losses, None
    sums = scores.new_zeros(pieces, rows, num_codebooks, dtype=torch.float32)
    with torch.cuda.device_of(scores):
        _gradient_kernel[(blocks, pieces)](
            places,
            logsumexp.contiguous(),
            sums,
            num_codebooks,
            on_label=1.0 - label_smoothing,
            on_all=label_smoothing / vocabulary,
            z_loss=float(z_loss),
            GRADIENT_PARTS=3 if scores.dtype is torch.float32 else 2,
            **arguments,
        )
    return losses, sums.sum(0).to(scores.dtype)


@triton.jit
def _scaled(sums, scale, cap, CAPPED: tl.constexpr):
    """Logits after scale and soft-cap, and the soft-cap's derivative."""
    z = sums * scale
    slope = 1.0
    if CAPPED:
        # tanh, whose own instruction is approximate; this has an error of some 2^-23.
        shrunk = tl.exp(-2.0 * tl.abs(z) / cap)
        tanh = (1.0 - shrunk) / (1.0 + shrunk)
        z = tl.where(z < 0.0, -cap * tanh, cap * tanh)
        slope = 1.0 - tanh * tanh
    return z, slope


@triton.jit
def _loss_kernel(
    places,
    found,
    kind_stride,
    score_parts,
    words,
    fine_words,
    tiles_a_piece,
    rows,
    vocabulary,
    scale,
    cap,
    num_words,
    part_stride,
    words_stride,
    fine_stride,
    num_fine,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_FINE: tl.constexpr,
    CAPPED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_N
    piece = tl.program_id(1)
    n = first_row + tl.arange(0, BLOCK_N)
    place = tl.load(places + n, mask=n < rows, other=-1).to(tl.int32)
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    sum_of_logits = tl.zeros([BLOCK_N], tl.float32)
    of_label = tl.zeros([BLOCK_N], tl.float32)
    end = tl.minimum((piece + 1) * tiles_a_piece * BLOCK_V, vocabulary)
    for first_column in range(piece * tiles_a_piece * BLOCK_V, end, BLOCK_V):
        sums = logits_tile(
            score_parts,
            words,
            fine_words,
            first_row,
            first_column,
            num_words,
            part_stride,
            words_stride,
            fine_stride,
            num_fine,
            PARTS,
            WORDS,
            BLOCK_N,
            BLOCK_V,
            HAS_FINE,
            OPERAND,
        )
        z, _ = _scaled(sums, scale, cap, CAPPED)
        columns = first_column + tl.arange(0, BLOCK_V)[None, :]
        of_label += tl.sum(tl.where(columns == place[:, None], z, 0.0), 1)
        sum_of_logits += tl.sum(tl.where(columns < vocabulary, z, 0.0), 1)
        z = tl.where(columns < vocabulary, z, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(z, 1))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest[:, None]), 1)
    inside = n < rows
    found += piece.to(tl.int64) * rows
    tl.store(found + n, largest, mask=inside)
    tl.store(found + kind_stride + n, total, mask=inside)
    tl.store(found + 2 * kind_stride + n, sum_of_logits, mask=inside)
    tl.store(found + 3 * kind_stride + n, of_label, mask=inside)


@triton.jit
def _gradient_kernel(
    places,
    logsumexp,
    sums_of_pieces,
    num_codebooks,
    score_parts,
    words,
    fine_words,
    tiles_a_piece,
    rows,
    vocabulary,
    scale,
    cap,
    on_label,
    on_all,
    z_loss,
    num_words,
    part_stride,
    words_stride,
    fine_stride,
    num_fine,
    PARTS: tl.constexpr,
    GRADIENT_PARTS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_FINE: tl.constexpr,
    CAPPED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_N
    piece = tl.program_id(1)
    n = tl.arange(0, BLOCK_N)
    row_inside = first_row + n < rows
    place = tl.load(places + first_row + n, mask=row_inside, other=-1).to(tl.int32)
    log_total = tl.load(logsumexp + first_row + n, mask=row_inside, other=0.0)[:, None]
    on_probability = 1.0 + 2.0 * z_loss * log_total
    sums_of_pieces += (piece * rows + first_row).to(tl.int64) * num_codebooks
    end = tl.minimum((piece + 1) * tiles_a_piece * BLOCK_V, vocabulary)
    for first_column in range(piece * tiles_a_piece * BLOCK_V, end, BLOCK_V):
        sums = logits_tile(
            score_parts,
            words,
            fine_words,
            first_row,
            first_column,
            num_words,
            part_stride,
            words_stride,
            fine_stride,
            num_fine,
            PARTS,
            WORDS,
            BLOCK_N,
            BLOCK_V,
            HAS_FINE,
            OPERAND,
        )
        z, slope = _scaled(sums, scale, cap, CAPPED)
        columns = first_column + tl.arange(0, BLOCK_V)[None, :]
        gradient = tl.exp(z - log_total) * on_probability - on_all
        gradient -= tl.where(columns == place[:, None], on_label, 0.0)
        gradient *= slope * scale
        gradient = tl.where((columns < vocabulary) & row_inside[:, None], gradient, 0.0)
        for first_word in range(0, num_words, WORDS):
            signs = tl.trans(
                sign_tile(
                    words,
                    fine_words,
                    first_word,
                    first_column,
                    words_stride,
                    fine_stride,
                    num_fine,
                    WORDS,
                    BLOCK_V,
                    HAS_FINE,
                    OPERAND,
                )
            )
            r = 32 * first_word + tl.arange(0, 32 * WORDS)[None, :]
            inside = row_inside[:, None] & (r < num_codebooks)
            target = sums_of_pieces + (n[:, None] * num_codebooks + r)
            so_far = tl.load(target, mask=inside, other=0.0)
            so_far = add_split_product(so_far, gradient, signs, GRADIENT_PARTS)
            tl.store(target, so_far, mask=inside)
        # The next tile goes on from these sums, and another thread may be the one that reads them.
        tl.debug_barrier()
