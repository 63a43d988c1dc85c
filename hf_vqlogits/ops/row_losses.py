"""Losses of rows of logits that are never all built, whatever the loss of a row is.

Rows are taken in chunks, as in Liger Kernel (arXiv 2410.10989). A chunk leaves behind its losses
and at once the gradient of its scores, N x R numbers in all, which backward scales by the gradient
of the losses. Where a dense layer needs three products of inner size d, this takes two of inner
size R, one of them by table look-ups. Memory is O(N R) beside the gradient in the logits of one
chunk.

With index codes and G = 1 all tokens of a codeword have the same logit, and the sum over tokens is
one over codewords, each counted as often as there are tokens: exact in O(N K), without logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import eager
from .registration import check, compute_expand, compute_expand_backward, without_autocast

# Bytes of the gradient in the logits of a chunk. The signs are written out anew for every chunk, so
# small ones take longer; larger ones take more memory than time is won (docs/kernels.md, Loss).
CHUNK_BYTES = 60 << 20
# Bytes of logits that are made, and passed over several times, while they are in the cache.
BLOCK_BYTES = 8 << 20
BLOCK_ROWS = 4  # share each load of a code in the kernels

REDUCTIONS = ("mean", "sum", "none")

# Losses (n,) and, if it is wanted, their gradient (n, C) in the logits, of logits (n, C), the class
# of each row's label (n,), and how many tokens every class stands for (C,), None for one each. The
# logits may be overwritten.
OfLogits = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def chunked(
    of_logits: OfLogits,
    scores: Tensor,
    codes: Tensor,
    code_type: str,
    fine_ids: Tensor | None,
    fine_codes: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    chunk_size: int | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses (N,), 0 but in `rows`, and their gradient in the scores, shaped as those or empty."""
    fine = (fine_ids, fine_codes)
    exact = eager.sum_dtype(scores.dtype)
    losses = scores.new_zeros(scores.shape[0], dtype=exact)
    gradient = torch.zeros_like(scores) if with_gradient else scores.new_empty(0)
    one_codebook = code_type == "index" and codes.shape[1] == 1
    counts = _tokens_per_codeword(codes, scores.shape[2]).to(exact) if one_codebook else None
    classes = codes.shape[0] if counts is None else len(counts)
    half = code_type == "sign" and scores.dtype == torch.bfloat16
    kind = scores.dtype if half else exact  # as fine as the gradient that is asked for
    size = chunk_size or max(1, CHUNK_BYTES // (max(1, classes) * kind.itemsize))
    size = -(-len(rows) // max(1, -(-len(rows) // size)))  # no small chunk at the end
    block, slopes, room = size, None, None
    if counts is None and scores.device.type == "cpu":
        # One place for all chunks: fresh memory costs as much time as to fill it.
        fit = BLOCK_BYTES // (max(1, classes) * exact.itemsize)
        block = min(size, max(BLOCK_ROWS, fit // BLOCK_ROWS * BLOCK_ROWS))
        if with_gradient:
            slopes = scores.new_empty(size, classes, dtype=kind)
        if slopes is None or kind != exact:
            room = scores.new_empty(block, classes, dtype=exact)

    def slope_in_logits(chunk: Tensor) -> Tensor | None:
        """The gradient (n, V) of the losses of a chunk's rows, which are entered."""
        slope = None
        for begin in range(0, len(chunk), block):
            some = chunk[begin : begin + block]
            kept = None if slopes is None else slopes[begin : begin + len(some)]
            place = kept if room is None else room[: len(some)]
            logits = compute_expand(scores[some].to(exact), codes, code_type, *fine, place)
            losses[some], slope = of_logits(logits, labels[some], None)
            if kept is not None and slope is not None:
                kept.copy_(slope)  # nothing to do where it was made in that place
        return slope if slope is None or slopes is None else slopes[: len(chunk)]

    with without_autocast(scores.device):
        for chunk in rows.split(size) if len(rows) else ():
            shape = (len(chunk), *scores.shape[1:])
            if counts is None:
                slope = slope_in_logits(chunk)
                if slope is not None:
                    slope = compute_expand_backward(slope.to(kind), codes, code_type, *fine, shape)
            else:
                target = codes[labels[chunk], 0].long()
                losses[chunk], slope = of_logits(scores[chunk][:, 0].to(exact), target, counts)
            if slope is not None:
                gradient[chunk] = slope.view(shape).to(scores.dtype)
    return losses, gradient


def final_logits(
    logits: Tensor, scale: float, softcap: float | None, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits after scale and soft-cap, in place, and the slope of the soft-cap, if there is one."""
    z = logits.mul_(scale) if scale != 1.0 else logits
    cap_slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        cap_slope = 1 - z.square() if with_slope else None
        z.mul_(softcap)
    return z, cap_slope


def slope_before(slope: Tensor, scale: float, cap_slope: Tensor | None) -> Tensor:
    """The gradient in the logits, of that in the [`final_logits`], in place."""
    if cap_slope is not None:
        slope.mul_(cap_slope)
    return slope.mul_(scale) if scale != 1.0 else slope


def counted_rows(labels: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """Rows that count, of labels (N,).

    Raises:
        IndexError: the label of one is no token.
    """
    rows = (labels != ignore_index).nonzero().squeeze(1)
    found = labels[rows]
    wrong = found[(found < 0) | (found >= vocabulary)]
    if len(wrong):
        raise IndexError(
            f"`labels` holds {int(wrong[0])}; with {vocabulary} tokens a label must lie in "
            f"0..{vocabulary - 1} or be `ignore_index`, {ignore_index}."
        )
    return rows


def reduced(
    losses: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
) -> Tensor:
    """Losses (N,) of rows as `reduction` says."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = (labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / (count.to(losses.device) if isinstance(count, Tensor) else count)


def _tokens_per_codeword(codes: Tensor, codebook_size: int) -> Tensor:
    counts = codes[:, 0].int().bincount(minlength=codebook_size)
    if len(counts) > codebook_size:
        raise IndexError(
            f"`codes` holds {len(counts) - 1}, but the scores have {codebook_size} codewords a "
            f"codebook: codes run from 0 to {codebook_size - 1}."
        )
    return counts


def keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save what backward needs; inputs begin with scores, 4 of codes, labels, the ignored one."""
    ctx.inputs = len(inputs)
    *_, labels, ctx.ignore_index = inputs[:7]
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, labels)


def gradient_of_losses(
    ctx: Any, grad_losses: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradient of the scores, and None for every other input."""
    if torch.is_grad_enabled():
        # `once_differentiable` would notice only a gradient of the losses that has a graph itself,
        # and let second derivatives that go through the scores be silently wrong.
        raise RuntimeError(
            "A loss without logits can be differentiated once, but `create_graph=True` asks for "
            "the graph of its gradient; use `expand` and the loss of its logits instead."
        )
    if grad_losses is None:
        return (None,) * ctx.inputs
    gradient, labels = ctx.saved_tensors
    # The mean over no rows has an infinite gradient; ignored rows have none, as in PyTorch.
    factor = grad_losses.masked_fill(labels == ctx.ignore_index, 0)
    factor = factor.view(-1, *[1] * (gradient.dim() - 1))
    return ((factor * gradient).to(gradient.dtype), *[None] * (ctx.inputs - 1))


def fake(scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Results of the right shapes, for tracing; the last argument: whether with a gradient."""
    check(scores, *arguments[:4])
    with_gradient = arguments[-1]
    losses = scores.new_empty(scores.shape[0], dtype=eager.sum_dtype(scores.dtype))
    return losses, torch.empty_like(scores) if with_gradient else scores.new_empty(0)


def check_tensors(hidden: Tensor, labels: Tensor, codebook: Tensor, codebook_bias: Tensor) -> None:
    """Check that hidden states, labels and codebook go together.

    Raises:
        ValueError: shapes that do not.
        TypeError: `labels` is not int64.
    """
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


def check_options(
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    softcap: float | None,
    chunk_size: int | None,
) -> None:
    """Check what all losses can be told.

    Raises:
        ValueError: an option is out of its range.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"`reduction` is {reduction!r}; it must be {', '.join(REDUCTIONS)}.")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(
            f"`num_items_in_batch` divides the sum in the place of a mean, but `reduction` is "
            f"{reduction!r}; leave one of them out."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`final_logit_softcapping` is {softcap}; it must be positive or None.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` is {chunk_size}; it must be at least one row, or None.")
