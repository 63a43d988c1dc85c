"""Rows of the matrix that sign codes stand for, written out for the tokens asked for only.

    torch.ops.vqlogits.gather_rows(codes, ids, codebook, scale, fine_ids, fine_codes) -> rows
    torch.ops.vqlogits.gather_rows_backward(
        grad, codes, ids, num_codebooks, scale, fine_ids, fine_codes
    ) -> grad

An operation of its own, as [`expand`] is: backward unpacks the signs once more instead of keeping
N x R numbers, and `torch.compile` sees one node.
"""

from typing import Any

import torch
from torch import Tensor

from . import eager
from .registration import FINE, LIBRARY, check_fine, without_autocast

TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    f"gather_rows(Tensor codes, Tensor ids, Tensor codebook, float scale, {FINE}) -> Tensor",
    tags=TAGS,
)
LIBRARY.define(
    "gather_rows_backward(Tensor grad, Tensor codes, Tensor ids, SymInt num_codebooks, "
    f"float scale, {FINE}) -> Tensor",
    tags=TAGS,
)


def gather_rows(
    codes: Tensor,
    ids: Tensor,
    codebook: Tensor,
    scale: float = 1.0,
    *,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
) -> Tensor:
    """Rows of tokens whose sign codes name codewords: what an embedding looks up.

    Equivalent to `embedding(ids, scale * unpack_signs(codes, R) @ codebook)` without the V x d
    table; half of the second codes' rows is added where there are any. Differentiable in
    `codebook`.

    Args:
        codes: sign codes uint8 (V, ceil(R / 8)).
        ids: tokens (...), int64 or int32.
        codebook: (R, d).
        scale: factor on every row, applied before the row is rounded to the codebook's type.
        fine_ids: (F,), tokens with a second sign code, ascending; or None.
        fine_codes: uint8 (F, ceil(R / 8)), those codes; they count half.

    Returns:
        (..., d) in the type of `codebook`.

    Raises:
        TypeError: codes or tokens have a type that the operation does not know.
        ValueError: the codes do not have the length that the codebook takes, or `fine_ids` and
            `fine_codes` do not fit them or each other.
        IndexError: an id lies outside 0..V-1 (on a GPU whatever PyTorch's indexing raises there).
    """
    gather = torch.ops.vqlogits.gather_rows.default
    rows = gather(codes, ids.reshape(-1), codebook, scale, fine_ids, fine_codes)
    return rows.view(*ids.shape, codebook.shape[-1])


def _check(
    codes: Tensor,
    ids: Tensor,
    codebook: Tensor,
    fine_ids: Tensor | None,
    fine_codes: Tensor | None,
) -> None:
    if codes.dtype is not torch.uint8:
        raise TypeError(f"`codes` is {codes.dtype}; sign codes must be uint8.")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"`ids` is {ids.dtype}; tokens must be int64 or int32.")
    width = (codebook.shape[0] + 7) // 8
    if codebook.dim() != 2 or codes.dim() != 2 or codes.shape[1] != width:
        raise ValueError(
            f"`codes` has shape {tuple(codes.shape)}, but a codebook of shape "
            f"{tuple(codebook.shape)} takes sign codes of shape (V, {width})."
        )
    check_fine(codes, "sign", fine_ids, fine_codes)


def _compute(codes: Tensor, ids: Tensor, codebook: Tensor, scale: float, *fine: Any) -> Tensor:
    _check(codes, ids, codebook, *fine)
    with without_autocast(codebook.device):
        return eager.gather_rows(codes, ids, codebook, scale, *fine)


def _compute_backward(grad: Tensor, *options: Any) -> Tensor:
    with without_autocast(grad.device):
        return eager.gather_rows_backward(grad, *options)


def _shape(codes: Tensor, ids: Tensor, codebook: Tensor, scale: float, *fine: Any) -> Tensor:
    _check(codes, ids, codebook, *fine)
    return codebook.new_empty(ids.shape[0], codebook.shape[1])


def _shape_backward(
    grad: Tensor, codes: Tensor, ids: Tensor, num_codebooks: int, *options: Any
) -> Tensor:
    return grad.new_empty(num_codebooks, grad.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, ids, codebook, ctx.scale, *fine = inputs
    ctx.num_codebooks = codebook.shape[0]
    ctx.save_for_backward(codes, ids, *fine)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, ids, *fine = ctx.saved_tensors
    backward = torch.ops.vqlogits.gather_rows_backward.default
    sums = backward(grad, codes, ids, ctx.num_codebooks, ctx.scale, *fine)
    return None, None, sums, *[None] * 3


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, ids, _, ctx.scale, *fine = inputs
    ctx.save_for_backward(codes, ids, *fine)


def _gradient_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, ids, *fine = ctx.saved_tensors
    # The operation is linear, so the transpose of its transpose is the operation itself.
    rows = torch.ops.vqlogits.gather_rows.default(codes, ids, grad, ctx.scale, *fine)
    return rows, *[None] * 6


for _name, _implementation, _fake, _backward, _setup in (
    ("gather_rows", _compute, _shape, _gradient, _keep),
    (
        "gather_rows_backward",
        _compute_backward,
        _shape_backward,
        _gradient_of_backward,
        _keep_backward,
    ),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vqlogits::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"vqlogits::{_name}", _backward, setup_context=_setup, lib=LIBRARY
    )
