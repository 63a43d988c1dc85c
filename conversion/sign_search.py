"""Better sign codes for a given codebook: tabu search, token by token.

Letters: V vocabulary, D = d + 1 whitened coordinates, R bits, n tokens of a tile. For one token
the error is a quadratic in its signs s. With e = x - C^T s, u = C m, A = C C^T and the half slope
g = C e + u (m . e), flipping bit k changes it by 4 (s_k g_k + A_kk + u_k^2), and afterwards
g += 2 s_k (A_k + u_k u): the best single flip costs R operations to find and R to make. Tabu
search (Glover, 1989) always makes the best flip, even one for the worse, forbids to undo it for a
while, and keeps the best codes met. Where some bits are frozen, e is that of all bits, and A, u and
g are those of the free ones.

The compiled search takes about a microsecond a flip and R = 1,000; without it the same search
runs in torch, all tokens of a tile in step, which suits a GPU and is slow on a processor.
"""

import ctypes
import logging
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from .metric import TokenMetric
from .sign_codebook import tiles

logger = logging.getLogger(__name__)

LANES = 16  # rows of the Gram matrix are padded to whole vectors of the widest kind


@dataclass(frozen=True)
class SearchEffort:
    """How long to search.

    Attributes:
        flips: at most, a token.
        tenure: flips for which a bit may not go back, and up to twice that; 0 stops at the first
            codes that no single flip improves.
        patience: flips without a new best after which a token is left.
    """

    flips: int
    tenure: int
    patience: int


def search_signs(
    metric: TokenMetric,
    signs: Tensor,
    codebook: Tensor,
    *,
    effort: SearchEffort,
    seed: int = 0,
    free: Tensor | None = None,
) -> None:
    """Search the codes of every token, in place; no token's error grows.

    Args:
        metric: rows and their metric.
        signs: (V, R) int8, +1 and -1.
        codebook: (R, D).
        effort: how long.
        seed: of the lengths of the bans.
        free: (n,) int64, the bits that may flip; default all.
    """
    compiled = _library() if signs.device.type == "cpu" else None
    words = codebook if free is None else codebook[free]
    gram = words @ words.T
    if compiled is not None:
        padded = -(-len(gram) // LANES) * LANES
        gram = torch.nn.functional.pad(gram, (0, padded - len(gram))).contiguous()
    for tile in tiles(len(signs)):
        difference = torch.addmm(metric.rows[tile], signs[tile].float(), codebook, alpha=-1)
        context = metric.context[tile] @ words.T  # (n, free bits)
        along = (difference * metric.context[tile]).sum(1, keepdim=True)
        slope = torch.addcmul(difference @ words.T, along, context)
        part = signs[tile] if free is None else signs[tile][:, free].contiguous()
        if compiled is None:
            search_tile(gram, slope, context, part, effort, seed + tile.start)
        else:
            _search_compiled(compiled, gram, slope, context, part, effort, seed, tile.start)
        if free is not None:
            signs[tile, free] = part


def free_bits(frozen: int, *widths: int) -> Tensor | None:
    """What [`search_signs`] takes as `free` where the first bits of each of several codes are not.

    Args:
        frozen: how many bits of each code.
        widths: bits of the codes, which lie side by side.
    """
    if not frozen:
        return None
    starts = [sum(widths[:i]) for i in range(len(widths))]
    parts = [torch.arange(s + frozen, s + w) for s, w in zip(starts, widths, strict=True)]
    return torch.cat(parts)


def search_tile(
    gram: Tensor, slope: Tensor, context: Tensor, signs: Tensor, effort: SearchEffort, seed: int
) -> None:
    """The search in torch, for all tokens of a tile in step.

    Args:
        gram: (R, R) codebook's Gram matrix.
        slope: (n, R), g at the start; overwritten.
        context: (n, R), u.
        signs: (n, R) int8, in place.
        effort: how long.
        seed: of the lengths of the bans.
    """
    generator = torch.Generator(slope.device).manual_seed(seed)
    current = signs.float()
    diagonal = gram.diagonal() + context.square()
    free_at = torch.zeros_like(slope)
    total, best = slope.new_zeros(len(slope)), slope.new_zeros(len(slope))
    best_at = torch.zeros_like(best)
    rows = torch.arange(len(slope), device=slope.device)
    for flip in range(effort.flips):
        cost = torch.addcmul(diagonal, current, slope)
        if effort.tenure:
            promising = cost < (best - total)[:, None]
            cost.masked_fill_((free_at > flip) & ~promising, torch.inf)
        change, bit = cost.min(1)
        active = (flip - best_at <= effort.patience) & change.isfinite()
        if not effort.tenure:
            active &= change < 0
        if flip % 16 == 0 and not active.any():
            break
        sign = current[rows, bit]
        factor = (2 * sign * active)[:, None]
        slope.addcmul_(factor, gram[bit])
        slope.addcmul_(factor * context[rows, bit, None], context)
        current[rows, bit] = torch.where(active, -sign, sign)
        total = torch.where(active, total + change, total)
        better = active & (total < best - 1e-6 * (diagonal[rows, bit] - best))
        best, best_at = torch.where(better, total, best), torch.where(better, flip + 1.0, best_at)
        signs.copy_(torch.where(better[:, None], current.to(torch.int8), signs))
        if effort.tenure:
            ban = torch.randint(
                effort.tenure, (len(rows),), generator=generator, device=slope.device
            )
            free_at[rows, bit] = (flip + 1 + effort.tenure + ban).float()


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled search, or None where the package was built without a compiler."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_sign_search" + suffix)
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
            function = library.hf_vqlogits_sign_search
        except (OSError, AttributeError) as error:
            logger.warning("The compiled search %s cannot be used: %s", path, error)
            continue
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        function.argtypes = [number] * 3 + [pointer] * 5 + [number] * 3 + [ctypes.c_uint64]
        function.argtypes += [number] * 2
        function.restype = ctypes.c_int
        return library
    logger.warning(
        "The search over sign codes was built without a C++ compiler: the fit takes minutes more "
        "and is a little worse. Reinstall with a compiler to have it."
    )
    return None


def _search_compiled(
    library: ctypes.CDLL,
    gram: Tensor,
    slope: Tensor,
    context: Tensor,
    signs: Tensor,
    effort: SearchEffort,
    seed: int,
    first_token: int,
) -> None:
    """The same, compiled; the Gram matrix is (R, R padded to whole vectors)."""
    tensors = (gram, slope, context, signs)
    assert all(t.is_contiguous() for t in tensors)
    change = torch.empty(len(signs))
    failed = library.hf_vqlogits_sign_search(
        *signs.shape,
        gram.shape[1],
        *(t.data_ptr() for t in tensors),
        change.data_ptr(),
        effort.flips,
        effort.tenure,
        effort.patience,
        seed % 2**64,
        first_token,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"No memory for the search over {signs.shape[1]} bits a token.")
