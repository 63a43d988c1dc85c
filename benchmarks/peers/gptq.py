"""GPTQ on the output layer alone, with the second moment of its inputs on calibration text.

Frantar, Ashkboos, Hoefler and Alistarh (2022), "GPTQ: Accurate post-training quantization for
generative pre-trained transformers".
"""

import torch
from torch import Tensor

from .grid import GROUP, fit_grid
from .layer import Compressed

BLOCK = 64  # columns whose errors reach the later columns in one matrix product


def gptq(
    weight: Tensor,
    second_moment: Tensor,
    bits: int,
    *,
    group: int = GROUP,
    damping: float = 0.01,
    search: bool = True,
) -> Compressed:
    """Round column after column; those still to come make up for what the logits lost.

    Of the paper's and its code's options: columns in falling order of E[h_i^2] (`act_order`), grids
    from the weights before the first column is rounded (`static_groups`), so that a group's columns
    are neighbours in the file, and ranges of least squared error (`mse`, in its square here).

    Args:
        weight: (V, d).
        second_moment: E[h h^T], (d, d).
        bits: of a code.
        group: columns that share a grid.
        damping: added to the diagonal, as a share of its mean.
        search: see [`grid.fit_grid`].

    Raises:
        ValueError: `group` does not divide d.
    """
    grid = fit_grid(weight, bits, group=group, search=search)
    moment = second_moment.double().clone()
    moment.diagonal().add_(damping * moment.diagonal().mean())
    order = moment.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment[order][:, order]))
    spread = torch.linalg.cholesky(inverse, upper=True).float()  # (d, d)
    columns = weight.float().T[order].contiguous()  # (d, V)
    for start in range(0, len(columns), BLOCK):
        end = min(start + BLOCK, len(columns))
        errors = torch.empty_like(columns[start:end])
        for i in range(start, end):
            rounded = grid.nearest(columns[i], int(order[i]) // group)
            errors[i - start] = (columns[i] - rounded) / spread[i, i]
            columns[i] = rounded
            columns[i + 1 : end].addr_(spread[i, i + 1 : end], errors[i - start], alpha=-1)
        columns[end:].addmm_(spread[start:end, end:].T, errors, alpha=-1)
    return Compressed(columns[order.argsort()].T.contiguous(), grid.total_bytes)
