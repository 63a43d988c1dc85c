"""Low rank: W as a product of a V x r and an r x d matrix, both in bfloat16."""

import torch
from torch import Tensor

from .layer import HALF, Compressed, through


def factors(
    weight: Tensor, rank: int, second_moment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The factors that lose least, by Eckart and Young (1936).

    Args:
        weight: (V, d).
        rank: r, at most d.
        second_moment: E[h h^T], (d, d) positive definite: the loss is then the mean square of the
            logits' error, E|(W - A B) h|^2 (whitened, as in SVD-LLM, Wang et al., 2024). Without,
            it is the squared error of the weights.

    Returns:
        A (V, r) and B (r, d), float64.
    """
    rows = weight.double()
    root = inverse = torch.eye(rows.shape[1], dtype=torch.float64)
    if second_moment is not None:
        values, vectors = torch.linalg.eigh(second_moment.double())
        root = (vectors * values.sqrt()) @ vectors.T
        inverse = (vectors * values.rsqrt()) @ vectors.T
    whitened = rows @ root
    leading = torch.linalg.eigh(whitened.T @ whitened)[1][:, -rank:]  # (d, r)
    return whitened @ leading, leading.T @ inverse


def low_rank(weight: Tensor, rank: int, second_moment: Tensor | None = None) -> Compressed:
    """The product of the rounded factors; arguments as of [`factors`]."""
    left, right = (
        through(factor, torch.bfloat16) for factor in factors(weight, rank, second_moment)
    )
    return Compressed(left @ right, HALF * (left.numel() + right.numel()))
