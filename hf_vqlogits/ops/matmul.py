"""Sign codes as a plain matrix product with the +-1 matrix that they stand for, which is kept.

Kept, the matrix takes the bytes of R columns of a dense layer, but it is unpacked once instead of
at every call. This is the path where no kernel reads the codes themselves: on other devices, and on
a CPU without the compiled one.
"""

import torch
from torch import Tensor

from .eager import unpack_signs
from .tensor_cache import TensorCache

# V 128,256 with R 2,000 in bfloat16. Larger matrices are unpacked piece by piece at every call.
_LARGEST_MATRIX_BYTES = 512 << 20

_matrices: TensorCache[Tensor] = TensorCache()


def fits(codes: Tensor, num_codebooks: int, dtype: torch.dtype) -> bool:
    """Whether the +-1 matrix is small enough to be kept, and edits of the codes are noticed."""
    matrix_bytes = codes.shape[0] * num_codebooks * dtype.itemsize
    return matrix_bytes <= _LARGEST_MATRIX_BYTES and TensorCache.can_hold(codes)


def expand(scores: Tensor, codes: Tensor) -> Tensor:
    """Logits (N, V) of scores (N, R), summed as the device's matrix product sums."""
    return scores @ _matrix(codes, scores.shape[1], scores.dtype).T


def expand_backward(grad: Tensor, codes: Tensor, num_codebooks: int) -> Tensor:
    """Gradient (N, R) with respect to the scores, from that of the logits (N, V)."""
    return grad @ _matrix(codes, num_codebooks, grad.dtype)


def _matrix(codes: Tensor, num_codebooks: int, dtype: torch.dtype) -> Tensor:
    def unpack() -> Tensor:
        return unpack_signs(codes, num_codebooks, dtype=dtype).contiguous()

    if not TensorCache.can_hold(codes):
        return unpack()
    return _matrices.get(codes, (num_codebooks, dtype), unpack)
