"""Logits from scores and codes on a GPU, and the gradient of the scores, in Triton.

    few rows     sign codes cut into fields of 4 bits. A program takes a row and a block of tokens,
                 makes the 16 partial sums of each field and looks them up for its tokens: 16 sums
                 serve all of them, and a look-up takes the place of four additions. Neighbouring
                 threads look up different tokens in one table, whose 16 numbers lie in 16 different
                 banks of shared memory, so that no access waits for another.
    many rows    a tile of codes is unpacked in registers to +1 and -1 (+-1/2 and +-3/2 where there
                 are second codes) and multiplied by a tile of scores on the tensor cores.
    index codes  a program takes a row and a block of tokens, and gathers a score a codebook.
    gradient     the product of the gradient (N, V) with the same tiles, transposed. The vocabulary
                 is cut into as many pieces as keep the device busy, whose sums are added afterwards
                 in a fixed order: the same input gives the same bits.

Sums are taken in float32, and every logit is rounded and written once. Second codes are counted
where a tile is unpacked. Sizes of tiles were chosen by counting instructions and registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .eager import FINE_FACTOR
from .triton_layout import WORD_BITS, WORDS_MULTIPLE, SignLayout, index_layout, sign_layout
from .triton_tiles import (
    BLOCK_V,
    add_split_product,
    code_arguments,
    logits_tile,
    operand_name,
    pieces_of_vocabulary,
    rows_of_a_tile,
    sign_tile,
    tile_arguments,
    warps_of_a_tile,
)

assert FINE_FACTOR == 0.5  # written out in the kernels

# Per row a look-up costs about as many instructions as unpacking the four signs that it stands for
# costs once for up to 128 rows, so tables lose from a few rows on. Estimated, not measured.
FEW_ROWS = 4
_LOOK_UP_BLOCK = 256
_GRADIENT_BLOCK = 64


def expand(
    scores: Tensor,
    codes: Tensor,
    code_type: str,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
    *,
    few_rows: int = FEW_ROWS,
) -> Tensor:
    """Logits (N, V) of scores (N, R) or (N, G, K), in their type.

    Args:
        scores: (N, R) with sign codes, (N, G, K) with index codes; float32, bfloat16 or float16.
        codes: sign codes uint8 (V, ceil(R / 8)); index codes (V, G), uint8 or int32.
        code_type: `"sign"` or `"index"`.
        fine_ids: (F,), tokens with a second sign code, each once; or None.
        fine_codes: uint8 (F, ceil(R / 8)), those codes; they count half.
        few_rows: up to so many rows are looked up in tables, more are multiplied.

    Returns:
        (N, V). Before it is rounded to its type, a logit has gone through at most
        32 + P ceil(R / 16) additions in float32 (P = 3 for float32 scores, else 1), each off by at
        most 2^-23 of the sum of the row's |scores| (half as much again with a second code).

    Raises:
        IndexError: an index code lies outside 0..K-1, or one of `fine_ids` outside 0..V-1.
        ValueError: `fine_ids` names a token twice.
    """
    logits = scores.new_empty(scores.shape[0], codes.shape[0])
    if logits.numel() == 0:
        return logits
    with torch.cuda.device_of(scores):
        if code_type == "index":
            _launch_indices(scores, codes, logits)
        else:
            launch = _launch_look_ups if len(scores) <= few_rows else _launch_products
            launch(scores, sign_layout(codes, fine_ids, fine_codes), logits)
    return logits


def expand_backward(
    grad: Tensor,
    codes: Tensor,
    num_codebooks: int,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
) -> Tensor:
    """Gradient (N, R) with respect to the scores, from that of the logits (N, V); sign codes.

    Its sums go through at most 32 + P ceil(V / 16) + `PROGRAMS` additions in float32 (P as in
    [`expand`]), each off by at most 2^-23 of the sum of the row's |gradients|.

    Raises:
        IndexError: one of `fine_ids` lies outside 0..V-1.
        ValueError: `fine_ids` names a token twice.
    """
    rows, vocabulary = grad.shape
    if grad.numel() == 0:
        return grad.new_zeros(rows, num_codebooks)
    layout = sign_layout(codes, fine_ids, fine_codes)
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    exact = grad.dtype is torch.float32
    block_n = rows_of_a_tile(rows, 64 if exact else 128)
    row_blocks = triton.cdiv(rows, block_n)
    word_blocks = layout.words.shape[0] // WORDS_MULTIPLE
    pieces, tiles_a_piece = pieces_of_vocabulary(
        vocabulary, _GRADIENT_BLOCK, row_blocks * word_blocks
    )
    sums = grad.new_empty(pieces, rows, num_codebooks, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        _gradient_kernel[(row_blocks, word_blocks, pieces)](
            grad,
            layout.tokens,
            sums,
            rows,
            vocabulary,
            num_codebooks,
            tiles_a_piece,
            grad.stride(0),
            PARTS=3 if exact else 1,
            BLOCK_N=block_n,
            OPERAND=operand_name(grad.dtype),
            num_warps=warps_of_a_tile(block_n),
            **code_arguments(layout) | {"BLOCK_V": _GRADIENT_BLOCK},
        )
    return sums.sum(0).to(grad.dtype)


def _launch_look_ups(scores: Tensor, layout: SignLayout, logits: Tensor) -> None:
    rows, vocabulary = logits.shape
    num_words = layout.words.shape[0]
    beyond = (0, WORD_BITS * num_words - scores.shape[1])
    # One axis, the rows running fastest: programs that read the same codes run at the same time.
    _look_up_kernel[(rows * triton.cdiv(vocabulary, _LOOK_UP_BLOCK),)](
        torch.nn.functional.pad(scores.float(), beyond).contiguous(),
        layout.tokens,
        logits,
        rows,
        vocabulary,
        num_warps=4,
        **code_arguments(layout) | {"BLOCK_V": _LOOK_UP_BLOCK},
    )


def _launch_products(scores: Tensor, layout: SignLayout, logits: Tensor) -> None:
    rows, vocabulary = logits.shape
    # Three parts of 128 rows in flight would not fit the shared memory of smaller GPUs.
    block_n = rows_of_a_tile(rows, 64 if scores.dtype is torch.float32 else 128)
    _product_kernel[(triton.cdiv(rows, block_n), triton.cdiv(vocabulary, BLOCK_V))](
        layout.tokens, logits, rows, vocabulary, **tile_arguments(scores, layout, block_n)
    )


def _launch_indices(scores: Tensor, codes: Tensor, logits: Tensor) -> None:
    rows, num_codebooks, codebook_size = scores.shape
    vocabulary = codes.shape[0]
    _index_kernel[(rows * triton.cdiv(vocabulary, _LOOK_UP_BLOCK),)](
        scores.contiguous(),
        index_layout(codes, codebook_size),
        logits,
        rows,
        vocabulary,
        num_codebooks,
        codebook_size,
        BLOCK_V=_LOOK_UP_BLOCK,
        num_warps=4,
    )


@triton.jit
def _look_up_kernel(
    scores,
    tokens,
    logits,
    rows,
    vocabulary,
    words,
    fine_words,
    num_words,
    words_stride,
    fine_stride,
    num_fine,
    BLOCK_V: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_FINE: tl.constexpr,
):
    row = (tl.program_id(0) % rows).to(tl.int64)
    scores += row * num_words * 32
    first_column = tl.program_id(0) // rows * BLOCK_V
    columns = first_column + tl.arange(0, BLOCK_V)
    shift = 4 * tl.arange(0, 8)  # of the eight fields of a word
    entry = tl.arange(0, 16)[None, :]
    sums = tl.zeros([8, BLOCK_V], tl.float32)
    for word in range(0, num_words):
        table = tl.zeros([8, 16], tl.float32)
        for bit in tl.static_range(4):
            score = tl.load(scores + 32 * word + shift + bit)[:, None]
            table += tl.where(((entry >> bit) & 1) != 0, score, -score)
        packed = tl.load(words + word * words_stride + columns)
        sums += tl.gather(table, (packed[None, :] >> shift[:, None]) & 15, 1)
        if HAS_FINE:
            if first_column < num_fine:
                packed = tl.load(fine_words + word * fine_stride + columns)
                half = 0.5 * tl.gather(table, (packed[None, :] >> shift[:, None]) & 15, 1)
                sums += tl.where((columns < num_fine)[None, :], half, 0.0)
    inside = columns < vocabulary
    token = columns
    if HAS_FINE:
        token = tl.load(tokens + columns, mask=inside, other=0)
    total = tl.sum(sums, 0).to(logits.dtype.element_ty)
    tl.store(logits + row * vocabulary + token, total, mask=inside)


@triton.jit
def _product_kernel(
    tokens,
    logits,
    rows,
    vocabulary,
    score_parts,
    words,
    fine_words,
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
    OPERAND: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_N
    first_column = tl.program_id(1) * BLOCK_V
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
    n = tl.arange(0, BLOCK_N)[:, None]
    columns = first_column + tl.arange(0, BLOCK_V)
    token = columns
    if HAS_FINE:
        token = tl.load(tokens + columns, mask=columns < vocabulary, other=0)
    logits += first_row.to(tl.int64) * vocabulary
    inside = (first_row + n < rows) & (columns < vocabulary)[None, :]
    place = n * vocabulary + token[None, :]
    tl.store(logits + place, sums.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _index_kernel(
    scores,
    codes,
    logits,
    rows,
    vocabulary,
    num_codebooks,
    codebook_size,
    BLOCK_V: tl.constexpr,
):
    row = (tl.program_id(0) % rows).to(tl.int64)
    v = tl.program_id(0) // rows * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = v < vocabulary
    scores += row * num_codebooks * codebook_size
    sums = tl.zeros([BLOCK_V], tl.float32)
    for _ in range(0, num_codebooks):
        code = tl.load(codes + v, mask=inside, other=0).to(tl.int32)
        sums += tl.load(scores + code, mask=inside, other=0.0).to(tl.float32)
        codes += vocabulary
        scores += codebook_size
    tl.store(logits + row * vocabulary + v, sums.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    grad,
    tokens,
    sums_of_pieces,
    rows,
    vocabulary,
    num_codebooks,
    tiles_a_piece,
    row_stride,
    words,
    fine_words,
    num_words,
    words_stride,
    fine_stride,
    num_fine,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_FINE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_N
    first_word = tl.program_id(1) * WORDS
    piece = tl.program_id(2)
    n = tl.arange(0, BLOCK_N)[:, None]
    grad += first_row.to(tl.int64) * row_stride
    sums = tl.zeros([BLOCK_N, 32 * WORDS], tl.float32)
    end = tl.minimum((piece + 1) * tiles_a_piece * BLOCK_V, vocabulary)
    for first_column in range(piece * tiles_a_piece * BLOCK_V, end, BLOCK_V):
        columns = first_column + tl.arange(0, BLOCK_V)
        token = columns
        if HAS_FINE:
            token = tl.load(tokens + columns, mask=columns < vocabulary, other=0)
        inside = (first_row + n < rows) & (columns < vocabulary)[None, :]
        some = tl.load(grad + (n * row_stride + token[None, :]), mask=inside, other=0.0)
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
        if PARTS == 1:
            sums = tl.dot(some.to(OPERAND), signs, sums)
        else:
            sums = add_split_product(sums, some, signs, PARTS)
    r = 32 * first_word + tl.arange(0, 32 * WORDS)[None, :]
    sums_of_pieces += (piece * rows + first_row).to(tl.int64) * num_codebooks
    inside = (first_row + n < rows) & (r < num_codebooks)
    tl.store(sums_of_pieces + (n * num_codebooks + r), sums, mask=inside)
