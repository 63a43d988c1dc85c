"""The objective of a linear support vector machine with squared hinge loss (L2-SVM), for batches.

    0.5 |w|^2 + C sum_n sum_k max(0, 1 - y[n, k] scores[n, k])^2,   y = +1 or -1

One column of scores is a binary machine, y = +1 for label 1 and -1 for label 0; several are
one-versus-rest, y[n, k] = +1 where k is the label of row n and -1 elsewhere. Agarap (2017),
"A Neural Network Architecture Combining Gated Recurrent Unit (GRU) and Support Vector Machine (SVM)
for Intrusion Detection in Network Traffic Data"; the loss is that of Tang (2013), "Deep Learning
using Linear Support Vector Machines".

Letters: N rows, C columns of scores (in code; the machine's factor C is `c`).
"""

import torch
from torch import Tensor


def squared_hinge(scores: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """The loss without the regulariser, summed over rows and columns.

    Equivalent to `torch.clamp(1 - y * scores, min=0).square().sum()`, y being +1 in the label's
    column and -1 in the others.

    Args:
        scores: (N, C); C = 1 is a binary machine with labels 0 and 1.
        labels: integers (N,), 0 to C - 1.
        ignore_index: label of the rows that do not count.

    Returns:
        A scalar, in float32 or the scores' type where that is wider.

    Raises:
        TypeError: `labels` are no integers.
        ValueError: shapes do not fit, or a label is outside the classes.
    """
    check_labels(labels, rows=len(scores), classes=max(2, scores.shape[-1]), ignore=ignore_index)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    positive = torch.arange(scores.shape[-1], device=scores.device)
    if scores.shape[-1] == 1:
        positive = positive + 1  # the one column stands for label 1
    signs = torch.where(labels[:, None] == positive, 1.0, -1.0).to(scores.dtype)  # (N, C)
    losses = torch.clamp(1 - signs * scores, min=0).square()
    return losses.masked_fill((labels == ignore_index)[:, None], 0).sum()


def l2_svm_objective(
    scores: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    c: float,
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The whole objective of a batch, or of one part of a batch that is processed in parts.

    Both terms are sums, as in the paper: the regulariser counts once a batch, however many rows
    that has, so a larger batch is regularised less in proportion; double `c` does the same as
    double rows. With `num_items` this call is for a part, and the regulariser is given by the
    part's share of the rows: over the parts of a batch (gradient accumulation, or processes whose
    losses are added) the results sum up to the objective of the whole.

    Args:
        scores: (N, C), as for [`squared_hinge`].
        labels: integers (N,).
        weight: of the linear layer that made the scores, (C, d); its bias is not regularised.
        c: the factor C, positive.
        num_items: rows that count in the whole batch; None: these are all.
        ignore_index: label of the rows that do not count.

    Returns:
        A scalar, in float32 or the scores' type where that is wider.

    Raises:
        TypeError: `labels` are no integers.
        ValueError: shapes do not fit, or a label is outside the classes.
    """
    loss = c * squared_hinge(scores, labels, ignore_index=ignore_index)
    regulariser = 0.5 * weight.to(loss.dtype).square().sum()
    if num_items is not None:
        regulariser = regulariser * (labels != ignore_index).sum() / at_least_one(num_items)
    return loss + regulariser


def at_least_one(count: Tensor | int) -> Tensor | int:
    """A number of rows to divide by; Trainer's is 0 for a batch in which no row counts."""
    return count.clamp(min=1) if torch.is_tensor(count) else max(1, count)


def check_labels(labels: Tensor, *, rows: int, classes: int, ignore: int = -100) -> None:
    """Check labels before a loss is computed, which would fail obscurely or not at all.

    Args:
        labels: to be checked.
        rows: how many there should be.
        classes: a label is below this.
        ignore: a label that is allowed beside the classes.

    Raises:
        TypeError: they are no integers.
        ValueError: they have another shape than (rows,), or one is outside the classes; the
            latter is a RuntimeError where the model is compiled.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"`labels` must be integers, got {labels.dtype}: the number of each row's class."
        )
    if labels.shape != (rows,):
        raise ValueError(
            f"`labels` must have the shape ({rows},) of the rows of scores, got "
            f"{tuple(labels.shape)}: one class a row."
        )
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore)
    allowed = (
        f"`labels` must lie between 0 and {classes - 1}, or be {ignore} for rows that do not count"
    )
    if torch.compiler.is_compiling():  # a compiled graph cannot say which
        torch._assert_async(~wrong.any(), f"{allowed}; there are {classes} classes.")
    elif bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{allowed}, got {int(labels[row])} in row {row}; there are {classes} classes."
        )
