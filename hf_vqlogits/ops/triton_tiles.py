"""What the Triton kernels share: tiles of +1 and -1 out of packed words, and exact products.

A product with +1 and -1 is exact in any type, so all that is rounded are the scores and the sums.
Tensor cores multiply 16-bit numbers and sum in float32. Scores of bfloat16 and float16 go in as
they are. A float32 has 24 binary digits, three times the 8 of a bfloat16: it is cut into three
parts, exactly (but for digits below 2^-133), and three products take the place of one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_layout import WORD_BITS, WORDS_MULTIPLE, SignLayout

# The decorator reads the environment variable TRITON_INTERPRET when a kernel is declared.
INTERPRETED = bool(triton.knobs.runtime.interpret)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_V = 128  # tokens of a tile
# Programs that keep a large GPU busy. A constant: sums do not depend on the device's size.
PROGRAMS = 128

# Triton's interpreter multiplies the bit patterns of bfloat16 numbers as if they were integers
# (3.9.0); what is cut to fit a bfloat16 is the same number in float32.
_OPERAND = torch.float32 if INTERPRETED else torch.bfloat16
_LEADING_DIGITS = -65536  # the bits of a float32 that a bfloat16 has
_NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def operand(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of type `dtype`, or their parts, are multiplied."""
    return dtype if dtype is torch.float16 else _OPERAND


def operand_name(dtype: torch.dtype) -> tl.dtype:
    """[`operand`], as kernels call it."""
    return _NAMES[operand(dtype)]


def rows_of_a_tile(rows: int, largest: int) -> int:
    """Rows of a tile, up to `largest`; the tensor cores take 16 at least."""
    return min(largest, max(16, triton.next_power_of_2(rows)))


def pieces_of_vocabulary(vocabulary: int, block_v: int, programs_a_piece: int) -> tuple[int, int]:
    """Into how many pieces to cut the tokens to have enough programs; tiles of a piece."""
    tiles = triton.cdiv(vocabulary, block_v)
    tiles_a_piece = triton.cdiv(tiles, triton.cdiv(PROGRAMS, programs_a_piece))
    return triton.cdiv(tiles, tiles_a_piece), tiles_a_piece


def tile_arguments(scores: Tensor, layout: SignLayout, block_n: int) -> dict[str, Any]:
    """What [`logits_tile`] takes, and what goes with it, by name.

    Args:
        scores: (N, R).
        layout: of the codes.
        block_n: rows of a tile.
    """
    num_words = layout.words.shape[0]
    filled_rows = triton.cdiv(len(scores), block_n) * block_n
    score_parts = parts(scores, filled_rows, WORD_BITS * num_words)
    return {
        "score_parts": score_parts,
        "part_stride": score_parts.stride(0),
        "PARTS": len(score_parts),
        "BLOCK_N": block_n,
        "OPERAND": operand_name(scores.dtype),
        "num_warps": warps_of_a_tile(block_n),
        **code_arguments(layout),
    }


def code_arguments(layout: SignLayout) -> dict[str, Any]:
    """What [`sign_tile`] takes, and what goes with it, by name."""
    return {
        "words": layout.words,
        "fine_words": layout.fine_words,
        "num_words": layout.words.shape[0],
        "words_stride": layout.words.shape[1],
        "fine_stride": layout.fine_words.shape[1],
        "num_fine": layout.num_fine,
        "HAS_FINE": layout.num_fine > 0,
        "WORDS": WORDS_MULTIPLE,
        "BLOCK_V": BLOCK_V,
    }


def warps_of_a_tile(block_n: int) -> int:
    """Groups of 32 threads for a tile of so many rows."""
    return 4 if block_n <= 32 else 8


def parts(scores: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Scores (N, R) as one or three addends, in the type in which they are multiplied.

    Args:
        scores: (N, R).
        num_rows: fill up with rows of zeros to so many.
        num_columns: likewise for the columns.

    Returns:
        (P, num_rows, num_columns), contiguous.
    """
    beyond = (0, num_columns - scores.shape[1], 0, num_rows - scores.shape[0])
    rest = torch.nn.functional.pad(scores, beyond).contiguous()
    if scores.dtype is not torch.float32:
        return rest.to(operand(scores.dtype)).unsqueeze(0)
    found = []
    for _ in range(3):
        leading = (rest.view(torch.int32) & _LEADING_DIGITS).view(torch.float32)
        # Infinity less itself would not be a number.
        rest = torch.where(leading == rest, 0.0, rest - leading)
        found.append(leading)
    return torch.stack(found).to(operand(scores.dtype))


@triton.jit
def sign_tile(
    words,
    fine_words,
    first_word,
    first_column,
    words_stride,
    fine_stride,
    num_fine,
    WORDS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_FINE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Signs (32 WORDS, BLOCK_V) from codebook 32 `first_word` and `first_column` on.

    Beyond R and V they are meaningless.
    """
    word = first_word + tl.arange(0, WORDS)
    columns = first_column + tl.arange(0, BLOCK_V)
    packed = tl.load(words + word[:, None] * words_stride + columns[None, :])
    one = tl.full([32 * WORDS, BLOCK_V], 1.0, OPERAND)
    signs = tl.where(_bits(packed, WORDS, BLOCK_V) != 0, one, -one)
    if HAS_FINE:
        if first_column < num_fine:
            packed = tl.load(fine_words + word[:, None] * fine_stride + columns[None, :])
            half = tl.where(_bits(packed, WORDS, BLOCK_V) != 0, one * 0.5, one * -0.5)
            signs += tl.where((columns < num_fine)[None, :], half, one * 0.0)
    return signs


@triton.jit
def _bits(packed, WORDS: tl.constexpr, BLOCK_V: tl.constexpr):
    bits = (packed[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
    return tl.reshape(bits, [32 * WORDS, BLOCK_V])


@triton.jit
def logits_tile(
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
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_FINE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Sums (BLOCK_N, BLOCK_V) in float32, from the given row and column on.

    Scores are (PARTS, rows, 32 num_words), all filled up to whole tiles, `part_stride` apart.
    """
    row_stride = 32 * num_words
    score_parts += first_row.to(tl.int64) * row_stride
    n = tl.arange(0, BLOCK_N)[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first_word in range(0, num_words, WORDS):
        signs = sign_tile(
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
        r = 32 * first_word + tl.arange(0, 32 * WORDS)[None, :]
        for part in tl.static_range(PARTS):
            place = part_stride.to(tl.int64) * part
            some = tl.load(score_parts + place + (n * row_stride + r))
            sums = tl.dot(some, signs, sums)
    return sums


@triton.jit
def add_split_product(sums, values, signs, PARTS: tl.constexpr):
    """`sums + values @ signs`, the float32 values cut into so many parts of 8 digits."""
    rest = values
    for _ in tl.static_range(PARTS):
        leading = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        sums = tl.dot(leading.to(signs.dtype), signs, sums)
        rest = tl.where(
            leading == rest, 0.0, rest - leading
        )  # infinity less itself is not a number
    return sums
