"""Cross-entropy of a vector-quantised output layer that never builds the N x V logits.

    loss[n] = logsumexp_v z[n, v] - z[n, label[n]],  z = softcap(logit_scale * logits)

Rows are taken in chunks, as in Liger Kernel (arXiv 2410.10989). A chunk leaves behind its losses
and at once the gradient of its scores, N x R numbers in all, which backward scales by the gradient
of the losses. Where a dense layer needs three products of inner size d, this takes two of inner
size R, one of them by table look-ups. Memory is O(N R) beside the logits of one chunk.

On a GPU, sign codes have kernels that reduce the logits tile by tile (`triton_cross_entropy.py`).

With index codes and G = 1 all tokens of a codeword have the same logit, and the sum over tokens is
one over codewords, each counted as often as there are tokens: exact in O(N K), without logits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, eager
from .registration import (
    CODES,
    LIBRARY,
    TAGS,
    check,
    compute_expand,
    compute_expand_backward,
    without_autocast,
)

# Bytes of the logits of a chunk. Forward and backward of 1,024 rows, V 50,257, R 500, 2 cores:
# 977, 596, 516, 493 ms with 8, 32, 64, 128 MB (dense, d 768, all rows at once: 1,455 ms).
_CHUNK_BYTES = 64 << 20

_REDUCTIONS = ("mean", "sum", "none")


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
        chunk_size: rows whose logits exist at a time; None takes 64 MB of logits. The GPU kernels
            for sign codes keep none.

    Returns:
        The loss in nats, a scalar, or (N,) with `"none"` (0 at ignored rows); float32, or float64
        if the scores are. The mean over no rows is NaN, as in PyTorch.

    Raises:
        ValueError: shapes that do not go together, or an option out of its range.
        TypeError: `labels` is not int64.
        IndexError: a label lies outside 0..V-1 and is not `ignore_index`.
        RuntimeError: in backward, with `create_graph=True`.
    """
    _check_tensors(hidden, labels, codebook, codebook_bias)
    _check_options(reduction, label_smoothing, final_logit_softcapping, chunk_size)
    _check_loss_options(reduction, z_loss, num_items_in_batch)
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
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = (labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / (count.to(losses.device) if isinstance(count, Tensor) else count)


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
    exact = eager.sum_dtype(scores.dtype)
    losses = scores.new_zeros(scores.shape[0], dtype=exact)
    gradient = torch.zeros_like(scores) if with_gradient else scores.new_empty(0)
    one_codebook = code_type == "index" and codes.shape[1] == 1
    counts = _tokens_per_codeword(codes, scores.shape[2]).to(exact) if one_codebook else None
    classes = codes.shape[0] if counts is None else len(counts)
    rows = (labels != ignore_index).nonzero().squeeze(1)
    _check_labels(labels[rows], codes.shape[0], ignore_index)
    if len(rows) and backends.for_cross_entropy(scores, codes, code_type) == "triton":
        from . import triton_cross_entropy  # which cannot be imported without Triton

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
    size = chunk_size or max(1, _CHUNK_BYTES // (max(1, classes) * exact.itemsize))
    with without_autocast(scores.device):
        for chunk in rows.split(size):
            part, target = scores[chunk].to(exact), labels[chunk]
            if counts is None:
                logits = compute_expand(part, codes, code_type, *fine)  # (n, V)
            else:
                logits, target = part[:, 0], codes[target, 0].long()  # (n, K)
            losses[chunk], slope = _losses_and_slope(logits, target, counts, options, with_gradient)
            if slope is None:
                continue
            if counts is None:
                shape = tuple(part.shape)
                slope = compute_expand_backward(slope, codes, code_type, *fine, shape)
            gradient[chunk] = slope.view(part.shape).to(scores.dtype)
    return losses, gradient


def _losses_and_slope(
    logits: Tensor, target: Tensor, counts: Tensor | None, options: _Options, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses (n,) of logits (n, C) over C classes, and their gradient (n, C) in the logits.

    A class stands for `counts` tokens of the same logit, or for one token. The logits are
    overwritten: one buffer of n x C serves all passes (a soft-cap takes a second), because these
    passes over memory take about as long as the products.
    """
    z = logits.mul_(options.logit_scale) if options.logit_scale != 1.0 else logits
    cap_slope = None
    if options.softcap is not None:
        z.div_(options.softcap).tanh_()
        cap_slope = 1 - z.square() if with_slope else None
        z.mul_(options.softcap)
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
    if cap_slope is not None:
        z.mul_(cap_slope)
    return losses, z.mul_(options.logit_scale) if options.logit_scale != 1.0 else z


def _tokens_per_codeword(codes: Tensor, codebook_size: int) -> Tensor:
    counts = codes[:, 0].int().bincount(minlength=codebook_size)
    if len(counts) > codebook_size:
        raise IndexError(
            f"`codes` holds {len(counts) - 1}, but the scores have {codebook_size} codewords a "
            f"codebook: codes run from 0 to {codebook_size - 1}."
        )
    return counts


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, labels, ctx.ignore_index = inputs[:7]
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, labels)


def _gradient_of_losses(
    ctx: Any, grad_losses: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        # `once_differentiable` would notice only a gradient of the losses that has a graph itself,
        # and let second derivatives that go through the scores be silently wrong.
        raise RuntimeError(
            "linear_cross_entropy can be differentiated once, but `create_graph=True` asks for the "
            "graph of its gradient; use `expand` and torch.nn.functional.cross_entropy instead."
        )
    if grad_losses is None:
        return (None,) * 13
    gradient, labels = ctx.saved_tensors
    # The mean over no rows has an infinite gradient; ignored rows have none, as in PyTorch.
    factor = grad_losses.masked_fill(labels == ctx.ignore_index, 0)
    factor = factor.view(-1, *[1] * (gradient.dim() - 1))
    return ((factor * gradient).to(gradient.dtype), *[None] * 12)


def _shapes(scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    check(scores, *arguments[:4])
    with_gradient = arguments[-1]
    losses = scores.new_empty(scores.shape[0], dtype=eager.sum_dtype(scores.dtype))
    return losses, torch.empty_like(scores) if with_gradient else scores.new_empty(0)


def _check_tensors(hidden: Tensor, labels: Tensor, codebook: Tensor, codebook_bias: Tensor) -> None:
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"`hidden` has shape {tuple(hidden.shape)} and `labels` {tuple(labels.shape)}; "
            "flatten them to (N, d) and (N,)."
        )
    if labels.dtype is not torch.int64:
        raise TypeError(f"`labels` is {labels.dtype}; token ids must be int64.")
    wanted = (*codebook_bias.shape, hidden.shape[1])
    if tuple(codebook.shape) != wanted:
        raise ValueError(
            f"`codebook` has shape {tuple(codebook.shape)}; with `codebook_bias` of shape "
            f"{tuple(codebook_bias.shape)} and a hidden size of {hidden.shape[1]} it must be "
            f"{wanted}."
        )


def _check_options(
    reduction: str, label_smoothing: float, softcap: float | None, chunk_size: int | None
) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"`reduction` is {reduction!r}; it must be {', '.join(_REDUCTIONS)}.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"`label_smoothing` is {label_smoothing}; it must lie in 0..1.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`final_logit_softcapping` is {softcap}; it must be positive or None.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` is {chunk_size}; it must be at least one row, or None.")


def _check_loss_options(
    reduction: str, z_loss: float, num_items_in_batch: int | Tensor | None
) -> None:
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"`z_loss` is {z_loss}; it must be a finite weight, 0 for none.")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(
            f"`num_items_in_batch` divides the sum in the place of a mean, but `reduction` is "
            f"{reduction!r}; leave one of them out."
        )


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = labels[(labels < 0) | (labels >= vocabulary)]
    if len(wrong):
        raise IndexError(
            f"`labels` holds {int(wrong[0])}; with {vocabulary} tokens a label must lie in "
            f"0..{vocabulary - 1} or be `ignore_index`, {ignore_index}."
        )


LIBRARY.define(
    f"cross_entropy(Tensor scores, {CODES}, Tensor labels, int ignore_index, "
    "float label_smoothing, float logit_scale, float? final_logit_softcapping, float z_loss, "
    "int? chunk_size, bool with_gradient) -> (Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.impl("cross_entropy", compute_cross_entropy, "CompositeExplicitAutograd")
torch.library.register_fake("vqlogits::cross_entropy", _shapes, lib=LIBRARY)
torch.library.register_autograd(
    "vqlogits::cross_entropy", _gradient_of_losses, setup_context=_keep_gradient, lib=LIBRARY
)
