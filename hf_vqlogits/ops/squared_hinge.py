"""Squared hinge loss of a vector-quantised output layer that never builds the N x V logits.

    loss[n] = sum_v max(0, 1 - y[n, v] z[n, v])^2,  y = +1 for the label and -1 for other tokens,

z = softcap(logit_scale * logits): one machine for every token against the rest (Tang 2013, "Deep
Learning using Linear Support Vector Machines"; Agarap 2017, arXiv 1709.03082). The chunks, and the
shortcut with one codebook, are those of `row_losses.py`.
"""

import torch
from torch import Tensor

from . import eager
from .registration import CODES, LIBRARY, TAGS, check
from .row_losses import (
    check_options,
    check_tensors,
    chunked,
    counted_rows,
    fake,
    final_logits,
    gradient_of_losses,
    keep_gradient,
    reduced,
    slope_before,
)


def linear_squared_hinge(
    hidden: Tensor,
    labels: Tensor,
    *,
    codebook: Tensor,
    codebook_bias: Tensor,
    codes: Tensor,
    code_type: str,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
    score_scale: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Squared hinge loss between the logits of a vector-quantised output layer and labels.

    A row's loss is a sum over all V tokens. Arguments, results and errors are those of
    [`linear_cross_entropy`], which see; differentiable once, in `hidden`, `codebook` and
    `codebook_bias`, in a memory of O(N R + chunk_size V).

    Returns:
        The loss, a scalar, or (N,) with `"none"` (0 at ignored rows); float32, or float64 if the
        scores are. The mean over no rows is NaN.
    """
    check_tensors(hidden, labels, codebook, codebook_bias)
    check_options(reduction, num_items_in_batch, final_logit_softcapping, chunk_size)
    scores = eager.scores(hidden, codebook, codebook_bias, scale=score_scale)
    losses, _ = torch.ops.vqlogits.squared_hinge.default(
        scores,
        codes,
        code_type,
        fine_ids,
        fine_codes,
        labels,
        ignore_index,
        logit_scale,
        final_logit_softcapping,
        chunk_size,
        torch.is_grad_enabled() and scores.requires_grad,
    )
    return reduced(losses, labels, ignore_index, reduction, num_items_in_batch)


def compute_squared_hinge(
    scores: Tensor,
    codes: Tensor,
    code_type: str,
    fine_ids: Tensor | None,
    fine_codes: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    logit_scale: float,
    final_logit_softcapping: float | None,
    chunk_size: int | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and the gradient of each in its row of scores, shaped as those or empty."""
    check(scores, codes, code_type, fine_ids, fine_codes)
    rows = counted_rows(labels, codes.shape[0], ignore_index)

    def of_logits(
        logits: Tensor, target: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        z, cap_slope = final_logits(logits, logit_scale, final_logit_softcapping, with_gradient)
        losses, slope = _losses_and_slope(z, target, counts)
        return losses, slope_before(slope, logit_scale, cap_slope) if with_gradient else None

    return chunked(
        of_logits,
        scores,
        codes,
        code_type,
        fine_ids,
        fine_codes,
        labels,
        rows,
        chunk_size,
        with_gradient,
    )


def _losses_and_slope(z: Tensor, target: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses (n,) of logits (n, C), which are overwritten, and their gradient (n, C)."""
    rows = torch.arange(len(z), device=z.device)
    wanted = z[rows, target]
    short = (1 - wanted).clamp_min_(0)  # by how much the label misses its margin
    as_other = (1 + wanted).clamp_min_(0)  # and what it would miss, were it another token
    excess = z.add_(1).clamp_min_(0)
    weighed = excess if counts is None else excess * counts
    losses = torch.einsum("nv,nv->n", weighed, excess) - as_other.square() + short.square()
    weighed[rows, target] -= as_other + short
    return losses, weighed.mul_(2)


LIBRARY.define(
    f"squared_hinge(Tensor scores, {CODES}, Tensor labels, int ignore_index, float logit_scale, "
    "float? final_logit_softcapping, int? chunk_size, bool with_gradient) -> (Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.impl("squared_hinge", compute_squared_hinge, "CompositeExplicitAutograd")
torch.library.register_fake("vqlogits::squared_hinge", fake, lib=LIBRARY)
torch.library.register_autograd(
    "vqlogits::squared_hinge", gradient_of_losses, setup_context=keep_gradient, lib=LIBRARY
)
