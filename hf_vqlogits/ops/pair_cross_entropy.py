"""Cross-entropy of index codes with two codebooks, exact and without any logit.

The logit of a token is z = x_a + y_b, x and y being the scores of the two codebooks and (a, b) its
code. With M[a, b] the number of tokens that have this code, the sum of exponentials is

    sum_v exp z_v = sum_ab exp(x_a) M[a, b] exp(y_b) = e^x M e^y,

a product with a K x K matrix in the place of V look-ups and V exponentials; its parts are also the
gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROWS_AT_ONCE = 4096
# Of K^2 multiplications for a token's two look-ups and its exponential; a product is that much
# faster on any machine.
PRODUCTS_PER_TOKEN = 8


class Sums(NamedTuple):
    """What the sum of exponentials of some rows is made of.

    Attributes:
        logsumexp: (n,), -inf where all tokens lie too far below the largest scores for the type.
        shares: (n, 2, K), probability of the tokens of every codeword.
    """

    logsumexp: Tensor
    shares: Tensor


def pays(scores: Tensor, codes: Tensor, code_type: str, softcap: float | None) -> bool:
    """Whether these are codes of two codebooks small enough for their product to be faster."""
    if code_type != "index" or codes.shape[1] != 2 or softcap is not None:
        return False
    return scores.shape[2] ** 2 <= PRODUCTS_PER_TOKEN * codes.shape[0]


def losses_and_gradient(
    scores: Tensor,
    codes: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float,
    logit_scale: float,
    z_loss: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Losses (n,) of rows of scores, and their gradient (n, 2, K).

    Args:
        scores: (n, 2, K), in the type in which sums are taken.
        codes: (V, 2).
        labels: tokens (n,).
        label_smoothing: as in [`linear_cross_entropy`].
        logit_scale: factor on every logit.
        z_loss: weight of logsumexp^2.
        with_gradient: else None in its place.

    Returns:
        Losses, gradient, and which rows (n,) have to be computed from their logits: in the others
        no sum fell below what the type can hold.

    Raises:
        IndexError: a code is no codeword.
    """
    pairs = _pairs(codes, scores.shape[2]).to(scores.dtype)
    counts = torch.stack([pairs.sum(1), pairs.sum(0)])  # (2, K)
    frequency = counts / codes.shape[0]
    losses, lost, gradients = [], [], []
    for some, tokens in zip(scores.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True):
        x = some * logit_scale
        found = _sums(x, pairs)
        own = codes[tokens].long().unsqueeze(-1)  # (n, 2, 1)
        target = x.gather(2, own).sum((1, 2))
        loss = found.logsumexp - (1 - label_smoothing) * target
        if label_smoothing:
            loss -= label_smoothing * (x * frequency).sum((1, 2))
        if z_loss:
            loss += z_loss * found.logsumexp.square()
        losses.append(loss)
        lost.append(found.logsumexp.isinf())
        if with_gradient:
            slope = found.shares
            if z_loss:
                slope = slope * (1 + 2 * z_loss * found.logsumexp)[:, None, None]
            own_part = torch.full_like(own, label_smoothing - 1, dtype=slope.dtype)
            slope = slope.scatter_add(2, own, own_part)
            if label_smoothing:
                slope -= label_smoothing * frequency
            gradients.append(slope * logit_scale)
    gradient = torch.cat(gradients) if gradients else None
    return torch.cat(losses), gradient, torch.cat(lost)


def _pairs(codes: Tensor, codebook_size: int) -> Tensor:
    """M (K, K): how many tokens have each pair of codewords."""
    if codes.numel() and int(codes.max()) >= codebook_size:
        raise IndexError(
            f"`codes` holds {int(codes.max())}, but the scores have {codebook_size} codewords a "
            f"codebook: codes run from 0 to {codebook_size - 1}."
        )
    place = codes[:, 0].long() * codebook_size + codes[:, 1].long()
    return place.bincount(minlength=codebook_size**2).view(codebook_size, codebook_size)


def _sums(x: Tensor, pairs: Tensor) -> Sums:
    largest = x.amax(2, keepdim=True)
    first, second = (x - largest).exp_().unbind(1)  # (n, K) each
    of_first = first * (second @ pairs.T)
    total = of_first.sum(1)
    of_second = second * (first @ pairs)
    # Numbers so small have few digits, or none.
    total = total.masked_fill(total < 1e8 * torch.finfo(x.dtype).tiny, 0.0)
    shares = torch.stack([of_first, of_second], 1) / total[:, None, None]
    return Sums(largest.sum((1, 2)) + total.log(), shares)
