"""Product and residual quantisation of the rows by faiss, in the metric of the weights.

Jégou, Douze and Schmid (2011), "Product quantization for nearest neighbor search"; Chen, Guan and
Wang (2010), "Approximate nearest neighbor search by residual vector quantization". Codewords are
stored in bfloat16.

More letters: M codes a row, K codewords each.
"""

from typing import Any

import faiss
import torch
from torch import Tensor

from hf_vqlogits.conversion.residual import reconstruct

from .layer import HALF, Compressed, packed_bytes, through

BEAM = 5  # faiss's own default


def product_codes(weight: Tensor, width: int, *, bits: int = 8, seed: int = 0) -> Compressed:
    """Each run of `width` columns is quantised by 2^bits codewords of its own.

    Args:
        weight: (V, d).
        width: columns of a code; divides d.
        bits: of a code.
        seed: of the first centroids.
    """
    rows = weight.float().numpy()
    books, words = weight.shape[1] // width, 2**bits
    quantiser: Any = faiss.ProductQuantizer(weight.shape[1], books, bits)
    quantiser.cp.seed = seed
    quantiser.train(rows)
    codes = _unpacked(quantiser.compute_codes(rows), books, bits)
    centroids = torch.from_numpy(faiss.vector_to_array(quantiser.centroids))
    codebook = through(centroids.view(books, words, width), torch.bfloat16)
    return Compressed(
        torch.cat([codebook[m][codes[:, m]] for m in range(books)], 1),
        packed_bytes(codes.numel(), bits) + HALF * codebook.numel(),
    )


def residual_codes(weight: Tensor, books: int, *, bits: int = 4, seed: int = 0) -> Compressed:
    """A sum of codewords, each chosen for what the ones before it left, by beam search.

    Args:
        weight: (V, d).
        books: M.
        bits: of a code.
        seed: of the first centroids.
    """
    rows = weight.float().numpy()
    size, words = weight.shape[1], 2**bits
    quantiser: Any = faiss.ResidualQuantizer(size, books, bits)
    # k-means on a growing number of columns, the default, took three times as long for 2% less
    # error on normal rows with d = 256.
    quantiser.train_type = faiss.ResidualQuantizer.Train_default
    quantiser.max_beam_size = BEAM
    quantiser.cp.seed = seed
    quantiser.train(rows)
    codes = _unpacked(quantiser.compute_codes(rows), books, bits)
    centroids = torch.from_numpy(faiss.vector_to_array(quantiser.codebooks))
    codebook = through(centroids.view(books, words, size), torch.bfloat16)
    return Compressed(
        reconstruct(codes, codebook),
        packed_bytes(codes.numel(), bits) + HALF * codebook.numel(),
    )


def _unpacked(codes: Any, books: int, bits: int) -> Tensor:
    return torch.from_numpy(faiss.unpack_bitstrings(codes, books, bits)).long()
