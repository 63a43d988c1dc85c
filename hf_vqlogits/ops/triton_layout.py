"""Codes in the order in which the Triton kernels read them.

    sign codes    words of 32 bits, (W, V): bit r of the token in column v is bit r % 32 of
                  words[r // 32, v], so that neighbouring threads read neighbours; W and V are
                  filled up to whole tiles, so that no load needs a mask
    index codes   (G, V)

Tokens that have a second code come first. Then one comparison tells whether any token of a tile has
one, and its signs s + s' / 2 are made where the tile is unpacked: every logit is written once.

Made from `codes` when first needed and kept as long as they do not change, like all such layouts.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .tensor_cache import TensorCache

WORD_BITS = 32
# What the kernels' tiles divide.
WORDS_MULTIPLE = 2
COLUMNS_MULTIPLE = 256

Layout = TypeVar("Layout")


class SignLayout(NamedTuple):
    """Sign codes as the kernels read them."""

    words: Tensor  # int32 (W, V)
    num_fine: int  # F
    fine_words: Tensor  # int32 (W, F), the second codes of the first F columns
    tokens: Tensor  # int32 (V,), the token of each column; unused without second codes
    columns: Tensor  # int64 (V,), the column of each token; unused without second codes


_sign_layouts: TensorCache[SignLayout] = TensorCache()
_index_layouts: TensorCache[Tensor] = TensorCache()


def sign_layout(codes: Tensor, fine_ids: Tensor | None, fine_codes: Tensor | None) -> SignLayout:
    """The layout of sign codes (V, ceil(R / 8)) and the second ones (F, ceil(R / 8)), if any.

    Raises:
        IndexError: one of `fine_ids` lies outside 0..V-1.
        ValueError: `fine_ids` names a token twice.
    """
    if fine_ids is None or fine_codes is None or len(fine_ids) == 0:
        return _kept(_sign_layouts, codes, (), lambda: _plain_layout(codes))
    ids, signs = fine_ids, fine_codes
    return _kept(_sign_layouts, codes, (ids, signs), lambda: _fine_layout(codes, ids, signs))


def index_layout(codes: Tensor, codebook_size: int) -> Tensor:
    """Index codes (V, G) as (G, V).

    Raises:
        IndexError: an index lies outside 0..K-1, where a kernel would read other memory.
    """

    def make() -> Tensor:
        if codes.numel():
            least, largest = (int(code) for code in codes.aminmax())
            if least < 0 or largest >= codebook_size:
                raise IndexError(
                    f"`codes` holds {least if least < 0 else largest}, but the scores have "
                    f"{codebook_size} codewords a codebook: codes run from 0 to "
                    f"{codebook_size - 1}."
                )
        return codes.T.clone(memory_format=torch.contiguous_format)

    return _kept(_index_layouts, codes, (), make, key=codebook_size)


def _kept(
    cache: TensorCache[Layout],
    codes: Tensor,
    others: tuple[Tensor, ...],
    make: Callable[[], Layout],
    key: Hashable = None,
) -> Layout:
    if not all(TensorCache.can_hold(tensor) for tensor in (codes, *others)):
        return make()
    return cache.get(codes, (key, len(others)), make, others)


def _plain_layout(codes: Tensor) -> SignLayout:
    words = _words(codes)
    return SignLayout(words, 0, words, words, words)


def _fine_layout(codes: Tensor, fine_ids: Tensor, fine_codes: Tensor) -> SignLayout:
    vocabulary = codes.shape[0]
    ids, order = fine_ids.long().sort()
    if not 0 <= int(ids[0]) <= int(ids[-1]) < vocabulary:
        raise IndexError(
            f"`fine_ids` holds {int(ids[0])} and {int(ids[-1])}, but must lie in "
            f"0..{vocabulary - 1}."
        )
    if bool((ids.diff() == 0).any()):
        raise ValueError("`fine_ids` names a token twice; a token has at most one second code.")
    other = torch.ones(vocabulary, dtype=torch.bool, device=codes.device)
    other[ids] = False
    tokens = torch.cat([ids, other.nonzero().squeeze(1)])
    columns = torch.empty_like(tokens)
    columns[tokens] = torch.arange(vocabulary, device=codes.device)
    words, fine_words = _words(codes[tokens]), _words(fine_codes[order])
    return SignLayout(words, len(ids), fine_words, tokens.int(), columns)


def _words(codes: Tensor) -> Tensor:
    bytes_beyond = -codes.shape[1] % (4 * WORDS_MULTIPLE)
    tokens_beyond = -codes.shape[0] % COLUMNS_MULTIPLE
    padded = torch.nn.functional.pad(codes, (0, bytes_beyond, 0, tokens_beyond)).contiguous()
    # The first byte of a word holds its lowest bits, on every machine that PyTorch runs on.
    return padded.view(torch.int32).T.contiguous()
