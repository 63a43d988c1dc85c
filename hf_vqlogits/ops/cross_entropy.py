"""Cross-entropy of a vector-quantised output layer that never builds the N x V logits.

    loss[n] = logsumexp_v z[n, v] - z[n, label[n]],  z = softcap(logit_scale * logits)

On a GPU, sign codes have kernels that reduce the logits tile by tile (`triton_cross_entropy.py`),
and index codes of two codebooks need no logits (`pair_cross_entropy.py`); everything else goes the
way of `row_losses.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, eager, pair_cross_entropy
from .registration import CODES, LIBRARY, TAGS, check, without_autocast
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


class _Options(NamedTuple):
    label_smoothing: float
    logit_scale: float
    softcap: float | None
    z_loss: float


def linear_cross_entropy(
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
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    z_loss: float = 0.0,
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross-entropy between the logits of a vector-quantised output layer and labels.

    Equivalent to `cross_entropy(softcap(logit_scale * expand(scores, codes)), labels)` with
    `scores = score_scale * linear(hidden, codebook, codebook_bias)`, in a memory of
    O(N R + chunk_size V).
    Differentiable once, in `hidden`, `codebook` and `codebook_bias`.

    Args:
        hidden: hidden states (N, d).
        labels: token ids (N,), int64, already shifted.
        codebook: (R, d) with sign codes, (G, K, d) with index codes.
        codebook_bias: (R,) or (G, K).
        codes: sign codes uint8 (V, ceil(R / 8)); index codes (V, G), uint8 or int32.
        code_type: `"sign"` or `"index"`.
        fine_ids: (F,), tokens with a second sign code, each once; or None.
        fine_codes: uint8 (F, ceil(R / 8)), those codes; they count half.
        score_scale: factor on every score.
        ignore_index: label of rows that count neither in the loss nor in its mean.
        reduction: `"mean"` over the rows that count, `"sum"` or `"none"`.
        label_smoothing: as in `torch.nn.functional.cross_entropy`, from 0 to 1.
        logit_scale: factor on every logit.
        final_logit_softcapping: c of softcap(x) = c tanh(x / c), or None.
        z_loss: weight of logsumexp(logits)^2, which is added to every row's loss (ST-MoE,
            arXiv 2202.08906).
        num_items_in_batch: with `"mean"`, divide the sum by this number, as Trainer does with rows
            spread over several batches, and not by that of the rows that count here.
        chunk_size: rows whose gradient in the logits exists at a time; None takes 60 MB. The GPU
            kernels for sign codes keep none.

    Returns:
        The loss in nats, a scalar, or (N,) with `"none"` (0 at ignored rows); float32, or float64
        if the scores are. The mean over no rows is NaN, as in PyTorch.

    Raises:
        ValueError: shapes that do not go together, or an option out of its range.
        TypeError: `labels` is not int64.
        IndexError: a label lies outside 0..V-1 and is not `ignore_index`.
        RuntimeError: in backward, with `create_graph=True`.
    """
    check_tensors(hidden, labels, codebook, codebook_bias)
    check_options(reduction, num_items_in_batch, final_logit_softcapping, chunk_size)
    _check_loss_options(label_smoothing, z_loss)
    scores = eager.scores(hidden, codebook, codebook_bias, scale=score_scale)
    losses, _ = torch.ops.vqlogits.cross_entropy.default(
        scores,
        codes,
        code_type,
        fine_ids,
        fine_codes,
        labels,
        ignore_index,
        label_smoothing,
        logit_scale,
        final_logit_softcapping,
        z_loss,
        chunk_size,
        torch.is_grad_enabled() and scores.requires_grad,
    )
    return reduced(losses, labels, ignore_index, reduction, num_items_in_batch)


def compute_cross_entropy(
    scores: Tensor,
    codes: Tensor,
    code_type: str,
    fine_ids: Tensor | None,
    fine_codes: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    final_logit_softcapping: float | None,
    z_loss: float,
    chunk_size: int | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and the gradient of each in its row of scores, shaped as those or empty."""
    check(scores, codes, code_type, fine_ids, fine_codes)
    fine = (fine_ids, fine_codes)
    options = _Options(label_smoothing, logit_scale, final_logit_softcapping, z_loss)
    rows = counted_rows(labels, codes.shape[0], ignore_index)
    if len(rows) and backends.for_cross_entropy(scores, codes, code_type) == "triton":
        from . import triton_cross_entropy  # which cannot be imported without Triton

        losses = scores.new_zeros(scores.shape[0], dtype=eager.sum_dtype(scores.dtype))
        gradient = torch.zeros_like(scores) if with_gradient else scores.new_empty(0)
        with without_autocast(scores.device):
            losses[rows], found = triton_cross_entropy.losses_and_gradient(
                scores[rows],
                codes,
                *fine,
                labels[rows],
                **options._asdict(),
                with_gradient=with_gradient,
            )
        if found is not None:
            gradient[rows] = found
        return losses, gradient

    def of_logits(
        logits: Tensor, target: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return _losses_and_slope(logits, target, counts, options, with_gradient)

    exact = None
    if len(rows) and pair_cross_entropy.pays(scores, codes, code_type, final_logit_softcapping):
        with without_autocast(scores.device):
            exact, found, lost = pair_cross_entropy.losses_and_gradient(
                scores[rows].to(eager.sum_dtype(scores.dtype)),
                codes,
                labels[rows],
                label_smoothing=label_smoothing,
                logit_scale=logit_scale,
                z_loss=z_loss,
                with_gradient=with_gradient,
            )
        kept, rows = rows[~lost], rows[lost]
    losses, gradient = chunked(
        of_logits, scores, codes, code_type, *fine, labels, rows, chunk_size, with_gradient
    )
    if exact is not None:
        losses[kept] = exact[~lost]
        if found is not None:
            gradient[kept] = found[~lost].to(gradient.dtype)
    return losses, gradient


def _losses_and_slope(
    logits: Tensor, target: Tensor, counts: Tensor | None, options: _Options, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses (n,) of logits (n, C) over C classes, and their gradient (n, C) in the logits.

    A class stands for `counts` tokens of the same logit, or for one token. The logits are
    overwritten: one buffer of n x C serves all passes (a soft-cap takes a second), because these
    passes over memory take about as long as the products.
    """
    z, cap_slope = final_logits(logits, options.logit_scale, options.softcap, with_slope)
    smoothing = options.label_smoothing
    rows = torch.arange(len(z), device=z.device)
    losses = -(1 - smoothing) * z[rows, target]
    if smoothing:  # this part of each label is spread evenly over all tokens
        losses -= smoothing * (z.mean(1) if counts is None else z @ (counts / counts.sum()))
    if counts is not None:
        z = z + counts.log()  # a codeword of no token: log 0 = -inf, probability 0
    largest = z.amax(1, keepdim=True)
    z.sub_(largest).exp_()
    total = z.sum(1, keepdim=True)
    logsumexp = largest + total.log()
    losses += logsumexp.squeeze(1)
    if options.z_loss:
        losses += options.z_loss * logsumexp.squeeze(1).square()
    if not with_slope:
        return losses, None
    z.div_(total)  # probabilities
    if options.z_loss:
        z.mul_(1 + 2 * options.z_loss * logsumexp)
    z[rows, target] -= 1 - smoothing
    if smoothing:
        z -= smoothing / z.shape[1] if counts is None else smoothing * counts / counts.sum()
    return losses, slope_before(z, options.logit_scale, cap_slope)


def _check_loss_options(label_smoothing: float, z_loss: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"`label_smoothing` is {label_smoothing}; it must lie in 0..1.")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"`z_loss` is {z_loss}; it must be a finite weight, 0 for none.")


LIBRARY.define(
    f"cross_entropy(Tensor scores, {CODES}, Tensor labels, int ignore_index, "
    "float label_smoothing, float logit_scale, float? final_logit_softcapping, float z_loss, "
    "int? chunk_size, bool with_gradient) -> (Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.impl("cross_entropy", compute_cross_entropy, "CompositeExplicitAutograd")
torch.library.register_fake("vqlogits::cross_entropy", fake, lib=LIBRARY)
torch.library.register_autograd(
    "vqlogits::cross_entropy", gradient_of_losses, setup_context=keep_gradient, lib=LIBRARY
)
