"""The compiled CPU kernels, called on tensors.

The paths `avx512`, `avx2` and `neon` look up 16-bit partial sums in tables that fit a register, for
sign codes and index codes with K <= 32 (AVX-512) or K <= 16; `amx` multiplies sign codes, for many
rows, as tiles of 8-bit integers; `plain` is portable C++ with tables of float32, for all codes.
"""

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .eager import FINE_FACTOR
from .library import load
from .precision import product_dtype
from .tensor_cache import TensorCache

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `Type` in csrc/numbers.h
# `Path` in csrc/expand.cpp, the fastest first.
_PATHS = {"amx": 4, "avx512": 1, "avx2": 2, "neon": 3, "plain": 0}
# K of the paths that read tiled codes: an index must fit a field of 5 or 4 bits, for its tables to
# fit a register. Tiles of a product stand for signs alone.
LARGEST_CODEBOOKS = {"amx": 0, "avx512": 32, "avx2": 16, "neon": 16}
LEAST_ROWS = {"amx": 24}  # below which the next path is faster (figures: csrc/kernel_amx.h)
SCORING_PATHS = ("avx512", "avx2", "neon")  # that [`logits`] knows
PIECE_BYTES = 4 << 20  # of the +-1 matrix, unpacked at a time


class _Coding(ctypes.Structure):
    """`Coding` in csrc/coding.h."""

    _fields_ = (
        ("vocabulary", ctypes.c_int64),
        ("codebooks", ctypes.c_int64),
        ("codewords", ctypes.c_int64),
        ("sign", ctypes.c_int32),
        ("code_bytes", ctypes.c_int32),
    )


class _Scoring(ctypes.Structure):
    """`Scoring` in csrc/layout.h."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


class _Fine(ctypes.Structure):
    """`Fine` in csrc/layout.h."""

    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("begins", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("factor", ctypes.c_float),
    )


class _PreparedFine(NamedTuple):
    """Second codes as the kernels read them."""

    fine: _Fine
    address: int  # of `fine`
    kept_alive: tuple[Tensor, ...]  # what it points to


class _Prepared(NamedTuple):
    """What the kernels need to know of a tensor of codes, beside its bytes."""

    coding: _Coding
    address: int  # of `coding`
    tiles: Tensor | None  # the codes in the order in which a kernel with tables reads them


_prepared: TensorCache[_Prepared] = TensorCache()
_prepared_fine: TensorCache[_PreparedFine] = TensorCache()


def paths() -> tuple[str, ...]:
    """The paths that this machine can take, the fastest first; none without the library.

    Each is the fastest from its `LEAST_ROWS` on.
    """
    library = load()
    return () if library is None else _paths_of(library)


@functools.cache
def _paths_of(library: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(name for name, path in _PATHS.items() if library.vqlogits_has(path))


def supports(path: str, scores: Tensor, codes: Tensor, code_type: str) -> bool:
    """Whether a path knows such scores and codes."""
    if scores.dtype not in TYPES or scores.device.type != "cpu":
        return False
    return path == "plain" or knows(path, codes, code_type, scores.shape[-1])


def knows(path: str, codes: Tensor, code_type: str, codewords: int) -> bool:
    """Whether a path of `LARGEST_CODEBOOKS` knows such codes; `codewords` is K of index codes."""
    small = code_type == "sign" or codewords <= LARGEST_CODEBOOKS[path]
    # Tiles that may no longer match their codes are worse than a slower kernel.
    return small and TensorCache.can_hold(codes)


def expand(
    scores: Tensor,
    codes: Tensor,
    code_type: str,
    path: str,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Logits (N, V) of scores (N, R) or (N, G, K), in their type, by one of the [`paths`].

    They are written to `out`, contiguous and of their type, where that is given and the path is one
    of `LARGEST_CODEBOOKS`.

    Second codes are for the paths of `LARGEST_CODEBOOKS` only, which add them where their tables
    are at hand.

    Sums are taken in float32. Those paths round their tables to multiples of a scale, one for each
    row and segment of the codes; a logit is off by at most half a scale per table (derived in
    csrc/tables_kernel.h), with normal scores by about 0.1% and at most 0.5% of the deviation of a
    row's logits. `amx` rounds the scores themselves (csrc/kernel_amx.h): a twentieth of that error
    where they are normal. A row with a score that is NaN or infinite becomes NaN as a whole there.

    Raises:
        IndexError: an index code lies outside 0..K-1, or one of `fine_ids` outside 0..V-1.
        ValueError: `fine_ids` names a token twice.
        MemoryError: there is no memory for the tables.
    """
    library = load()
    assert library is not None
    prepared = _prepare(codes, code_type, tuple(scores.shape[1:]), path)
    exact = scores.to(torch.float32).contiguous()
    rows, threads = scores.shape[0], torch.get_num_threads()
    if prepared.tiles is not None:
        fine = _fine_of(path, prepared, codes, fine_ids, fine_codes)
        logits = out
        if logits is None:
            logits = torch.empty(rows, codes.shape[0], dtype=scores.dtype, device="cpu")
        failed = library.vqlogits_expand_tiles(
            _PATHS[path],
            prepared.address,
            exact.data_ptr(),
            prepared.tiles.data_ptr(),
            None if fine is None else fine.address,
            rows,
            TYPES[scores.dtype],
            logits.data_ptr(),
            threads,
        )
    else:
        codes = codes.contiguous()
        logits = torch.empty(rows, codes.shape[0], dtype=torch.float32, device="cpu")
        failed = library.vqlogits_expand_plain(
            prepared.address, exact.data_ptr(), codes.data_ptr(), rows, logits.data_ptr(), threads
        )
    if failed:
        raise MemoryError(f"no memory for the tables of {rows} rows of scores")
    return logits.to(scores.dtype)


def expand_backward(grad: Tensor, codes: Tensor, num_codebooks: int) -> Tensor:
    """Gradient (N, R) of the scores of sign codes, from that of the logits (N, V), in float32.

    A product with the +-1 matrix, of which a piece at a time is written out. A gradient in bfloat16
    is multiplied as it is where the processor has instructions for it. V 50,257, R 500, 334 rows, 2
    cores: 91 ms in float32, 56 ms in bfloat16, where pieces written by PyTorch took 97 ms.
    """
    library = load()
    assert library is not None
    vocabulary, width = codes.shape
    codes, threads = codes.contiguous(), torch.get_num_threads()
    if grad.dtype != product_dtype(grad.device):
        grad = grad.float()
    sums = torch.zeros(grad.shape[0], num_codebooks, dtype=torch.float32, device="cpu")
    step = max(1, PIECE_BYTES // (8 * width * grad.dtype.itemsize))
    piece = torch.empty(min(step, vocabulary), 8 * width, dtype=grad.dtype, device="cpu")
    for begin in range(0, vocabulary, step):
        some = codes[begin : begin + step]
        kind = TYPES[grad.dtype]
        library.vqlogits_unpack(some.data_ptr(), some.numel(), kind, piece.data_ptr(), threads)
        signs = piece[: len(some), :num_codebooks]
        part = grad[:, begin : begin + step]
        if grad.dtype == torch.float32:
            sums.addmm_(part, signs)
        else:
            sums += part @ signs
    return sums


def logits(
    hidden: Tensor,
    codebook: Tensor,
    codebook_bias: Tensor,
    codes: Tensor,
    code_type: str,
    scale: float,
    path: str,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Logits (N, V) of a few hidden states (N, d), by a path of `SCORING_PATHS`.

    All in one of `TYPES`, but logits in another, `dtype`, where that is given. Scores are sums of
    products in float32; the rest is [`expand`].

    Raises:
        IndexError: as [`expand`].
        ValueError: as [`expand`].
        MemoryError: there is no memory for the tables.
    """
    library = load()
    assert library is not None
    prepared = _prepare(codes, code_type, tuple(codebook_bias.shape), path)
    assert prepared.tiles is not None
    fine = _fine_of(path, prepared, codes, fine_ids, fine_codes)
    exact = hidden.to(torch.float32).contiguous()
    codebook, codebook_bias = codebook.contiguous(), codebook_bias.contiguous()
    scoring = _Scoring(
        exact.data_ptr(),
        codebook.data_ptr(),
        codebook_bias.data_ptr(),
        exact.shape[1],
        scale,
        TYPES[hidden.dtype],
    )
    out = torch.empty(hidden.shape[0], codes.shape[0], dtype=dtype or hidden.dtype, device="cpu")
    failed = library.vqlogits_logits_tiles(
        _PATHS[path],
        prepared.address,
        ctypes.byref(scoring),
        prepared.tiles.data_ptr(),
        None if fine is None else fine.address,
        hidden.shape[0],
        TYPES[out.dtype],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the tables of {hidden.shape[0]} hidden states")
    return out


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of logits (N, V) in one of `TYPES`, descending, and their tokens (N, k).

    Of equal logits the first tokens are taken. NaN is in no order: a row that has fewer than k
    numbers ends in NaN of token 0.

    Raises:
        MemoryError: there is no memory for the candidates.
    """
    library = load()
    assert library is not None
    logits = logits.contiguous()
    rows, vocabulary = logits.shape
    values = torch.empty(rows, k, dtype=torch.float32, device="cpu")
    tokens = torch.empty(rows, k, dtype=torch.long, device="cpu")
    failed = library.vqlogits_largest(
        logits.data_ptr(),
        TYPES[logits.dtype],
        rows,
        vocabulary,
        k,
        values.data_ptr(),
        tokens.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the {k} largest logits of {rows} rows")
    return values.to(logits.dtype), tokens


def _prepare(codes: Tensor, code_type: str, shape: tuple[int, ...], path: str) -> _Prepared:
    def make() -> _Prepared:
        return _make_prepared(codes, code_type, shape, path)

    if not TensorCache.can_hold(codes):
        return make()
    return _prepared.get(codes, (code_type, shape, path), make)


def _make_prepared(codes: Tensor, code_type: str, shape: tuple[int, ...], path: str) -> _Prepared:
    sign = code_type == "sign"
    codewords = 2 if sign else shape[1]
    if not sign and codes.numel():
        least, largest = (int(code) for code in codes.aminmax())
        if least < 0 or largest >= codewords:
            raise IndexError(
                f"`codes` holds {least if least < 0 else largest}, but the scores have {codewords} "
                f"codewords a codebook: codes run from 0 to {codewords - 1}."
            )
    coding = _Coding(codes.shape[0], shape[0], codewords, sign, codes.element_size())
    address = ctypes.addressof(coding)
    if path == "plain":
        return _Prepared(coding, address, None)
    library = load()
    assert library is not None
    codes = codes.contiguous()
    number, threads = _PATHS[path], torch.get_num_threads()
    size = library.vqlogits_tile_bytes(number, address)
    tiles = torch.empty(size, dtype=torch.uint8, device="cpu")
    library.vqlogits_tile(number, address, codes.data_ptr(), tiles.data_ptr(), threads)
    return _Prepared(coding, address, tiles)


def _fine_of(
    path: str,
    prepared: _Prepared,
    codes: Tensor,
    fine_ids: Tensor | None,
    fine_codes: Tensor | None,
) -> _PreparedFine | None:
    """Second codes as the kernels read them, to be held while they do; None without."""
    if fine_ids is None or fine_codes is None:
        return None
    ids, second, vocabulary = fine_ids, fine_codes, codes.shape[0]

    def make() -> _PreparedFine:
        return _make_prepared_fine(_PATHS[path], prepared.address, vocabulary, ids, second)

    if not TensorCache.can_hold(second) or not TensorCache.can_hold(ids):
        return make()
    return _prepared_fine.get(second, (path, vocabulary), make, others=(ids,))


def _make_prepared_fine(
    path: int, coding: int, vocabulary: int, fine_ids: Tensor, fine_codes: Tensor
) -> _PreparedFine:
    library = load()
    assert library is not None
    ids, order = fine_ids.long().sort()
    if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < vocabulary:
        raise IndexError(
            f"`fine_ids` holds {int(ids[0])} and {int(ids[-1])}, but must lie in "
            f"0..{vocabulary - 1}."
        )
    if bool((ids.diff() == 0).any()):
        raise ValueError("`fine_ids` names a token twice; a token has at most one second code.")
    task_tokens, block_tokens = library.vqlogits_task_tokens(), library.vqlogits_block_tokens()
    counts = (ids // task_tokens).bincount(minlength=-(-vocabulary // task_tokens))
    begins = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    blocks = torch.nn.functional.pad((-(-counts // block_tokens)).cumsum(0), (1, 0))
    token_bytes = library.vqlogits_tile_bytes(path, coding) // max(1, len(counts) * task_tokens)
    size = int(blocks[-1]) * block_tokens * token_bytes
    tiles = torch.empty(size, dtype=torch.uint8, device="cpu")
    kept_alive = (ids.int(), begins, blocks, tiles)
    fine = _Fine(*(tensor.data_ptr() for tensor in kept_alive), FINE_FACTOR)
    address = ctypes.addressof(fine)
    rows = fine_codes[order].contiguous()
    library.vqlogits_tile_fine(
        path, coding, address, rows.data_ptr(), tiles.data_ptr(), torch.get_num_threads()
    )
    return _PreparedFine(fine, address, kept_alive)
