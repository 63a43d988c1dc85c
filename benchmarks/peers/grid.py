"""Uniform grids: every group of a row's weights has a scale and a zero point."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layer import HALF, Compressed, packed_bytes, through

GROUP = 64
SHARES = tuple(1 - step / 20 for step in range(13))  # of the range, 1 to 0.4


@dataclass(frozen=True)
class Grid:
    """Grids of a (V, d) matrix in groups of consecutive columns.

    Attributes:
        scale: (V, d / group) float32, values of float16.
        zero: (V, d / group) float32, integers in 0..2^bits - 1.
        bits: of a code.
        group: columns that share a grid.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    group: int

    def nearest(self, values: Tensor, group: int | slice = slice(None)) -> Tensor:
        """Nearest points of the grids: values (V, groups, columns), or (V,) of one group."""
        scale, zero = self.scale[:, group], self.zero[:, group]
        if values.dim() > scale.dim():
            scale, zero = scale[..., None], zero[..., None]
        codes = (values / scale).round_().add_(zero).clamp_(0, 2**self.bits - 1)
        return codes.sub_(zero).mul_(scale)

    @property
    def total_bytes(self) -> int:
        """Codes and zero points of `bits` bits each without gaps, scales in 16 bits."""
        count = self.scale.numel()
        codes = packed_bytes(count * self.group, self.bits)
        return codes + packed_bytes(count, self.bits) + HALF * count


def fit_grid(weight: Tensor, bits: int, *, group: int = GROUP, search: bool = False) -> Grid:
    """Grids from the least to the largest weight of every group, 0 among them.

    Args:
        weight: (V, d).
        bits: of a code.
        group: columns that share a grid.
        search: try narrower ranges too (`SHARES`), and take the one of least squared error.

    Raises:
        ValueError: `group` does not divide d.
    """
    if weight.shape[1] % group:
        raise ValueError(f"`group` {group} does not divide the {weight.shape[1]} columns.")
    values = weight.float().unflatten(1, (-1, group))
    low, high = values.amin(2).clamp_max(0), values.amax(2).clamp_min(0)
    best = _grid(low, high, bits, group)
    if not search:
        return best
    least = _loss(best, values)
    for share in SHARES[1:]:
        grid = _grid(share * low, share * high, bits, group)
        loss = _loss(grid, values)
        better = loss < least
        least = torch.where(better, loss, least)
        scale = torch.where(better, grid.scale, best.scale)
        best = Grid(scale, torch.where(better, grid.zero, best.zero), bits, group)
    return best


def round_to_nearest(
    weight: Tensor, bits: int, *, group: int = GROUP, search: bool = False
) -> Compressed:
    """Every weight to the nearest point of its grid; arguments as of [`fit_grid`]."""
    grid = fit_grid(weight, bits, group=group, search=search)
    values = weight.float().unflatten(1, (-1, group))
    return Compressed(grid.nearest(values).flatten(1), grid.total_bytes)


def _grid(low: Tensor, high: Tensor, bits: int, group: int) -> Grid:
    levels = 2**bits - 1
    least = torch.finfo(torch.float16).tiny  # a group of zeros has no range
    scale = through(((high - low) / levels).clamp_min(least), torch.float16)
    return Grid(scale, (-low / scale).round_().clamp_(0, levels), bits, group)


def _loss(grid: Grid, values: Tensor) -> Tensor:
    return grid.nearest(values).sub_(values).square_().sum(2)
