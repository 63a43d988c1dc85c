"""First sign codes: blocks of rank-one steps on the residual, coarse to fine.

Letters: V vocabulary, D = d + 1 whitened coordinates, R bits, b bits of a block.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .metric import TokenMetric
from .sign_codebook import tiles

POWER_ITERATIONS = 2
BLOCK = 16


def greedy_block(
    metric: TokenMetric, residual: Tensor, bits: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The next bits of every token, chosen for a residual, which is updated in place.

    One bit at a time would need a dozen passes over the V x D residual for each. Here a block of
    b bits shares them: block power iteration finds the residual's b leading directions, the
    rank-one steps (leading direction, its sign, its weighted mean) are made within that subspace
    on V x b numbers, and one least-squares solve gives their codewords. Cost: about
    4 (`POWER_ITERATIONS` + 1.5) V D b operations and `POWER_ITERATIONS` * 2 + 4 passes.

    Args:
        metric: weights of the tokens; the contexts play no part yet.
        residual: (V, D), what the codes so far leave.
        bits: b, at most D.
        generator: of the first directions.

    Returns:
        signs (V, b) int8 and codewords (b, D).
    """
    weight = metric.weight[:, None]
    basis = torch.randn(residual.shape[1], bits, generator=generator).to(residual.device)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(residual.T @ (weight * (residual @ basis)))[0]
    inner = residual @ basis  # (V, b)
    signs = torch.empty(len(inner), bits, device=inner.device)
    for bit in range(bits):
        direction = torch.linalg.eigh(inner.T @ (weight * inner))[1][:, -1]
        for _ in range(2):
            sign = torch.where(inner @ direction < 0, -1.0, 1.0)
            direction = inner.T @ (metric.weight * sign)
        signs[:, bit] = sign
        inner.addr_(sign, direction, alpha=-1)
    weighted = weight * signs
    gram = signs.T @ weighted
    gram.diagonal().add_(1e-4)  # weights sum to 1, so does the diagonal; equal bits may occur
    codewords = torch.linalg.solve(gram, weighted.T @ residual)
    residual.addmm_(signs, codewords, alpha=-1)
    return signs.to(torch.int8), codewords


def extend_greedily(
    metric: TokenMetric,
    signs: Tensor,
    codebook: Tensor,
    bits: int,
    *,
    generator: torch.Generator,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[Tensor, Tensor]:
    """More bits for codes (V, R0) and codewords (R0, D): a prefix of the result stays as it was.

    Args:
        metric: rows and weights.
        signs: (V, R0), +1 and -1 or other levels, of any type; R0 may be 0.
        codebook: (R0, D).
        bits: R, how many there shall be.
        generator: of the first directions of each block.
        progress: wraps the iteration over blocks.

    Returns:
        signs (V, R), int8 where the given ones are, and codebook (R, D).
    """
    residual = metric.rows.clone()
    for tile in tiles(len(signs)):
        residual[tile].addmm_(signs[tile].float(), codebook, alpha=-1)
    size = min(BLOCK, residual.shape[1])
    parts, words, done = [signs], [codebook], len(codebook)
    for start in progress(range(done, bits, size)):
        block, codewords = greedy_block(metric, residual, min(size, bits - start), generator)
        parts.append(block)
        words.append(codewords)
    return torch.cat(parts, 1), torch.cat(words)
