"""Rows of the matrix that sign codes stand for, written out for the tokens asked for only.

    torch.ops.vqlogits.gather_rows(codes, ids, codebook, scale) -> rows
    torch.ops.vqlogits.gather_rows_backward(grad, codes, ids, num_codebooks, scale) -> grad

An operation of its own, as [`expand`] is: backward unpacks the signs once more instead of keeping
N x R numbers, and `torch.compile` sees one node.
"""

from typing import Any

import torch
from torch import Tensor

from . import eager
from .registration import LIBRARY, without_autocast

TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "gather_rows(Tensor codes, Tensor ids, Tensor codebook, float scale) -> Tensor", tags=TAGS
)
LIBRARY.define(
    "gather_rows_backward(Tensor grad, Tensor codes, Tensor ids, SymInt num_codebooks, "
    "float scale) -> Tensor",
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

    Equivalent to `embedding(ids, scale * unpack_signs(codes, R) @ codebook)`, without the V x d
    table. Differentiable in `codebook`.

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
        TypeError: `codes` or `ids` has a type that the operation does not know.
        ValueError: the codes do not have the length that the codebook takes.
        IndexError: an id lies outside 0..V-1 (on a GPU whatever PyTorch's indexing raises there).
    """
    gather = torch.ops.vqlogits.gather_rows.default
    flat = ids.reshape(-1)
    rows = gather(codes, flat, codebook, scale)
    if fine_ids is not None and fine_codes is not None:
        # For all tokens, as the number of those that have one would be a shape made of data.
        place = torch.searchsorted(fine_ids, flat.to(fine_ids.dtype)).clamp(max=len(fine_ids) - 1)
        share = (fine_ids[place] == flat).to(rows.dtype) * eager.FINE_FACTOR
        rows = rows + share.unsqueeze(1) * gather(fine_codes, place, codebook, scale)
    return rows.view(*ids.shape, codebook.shape[-1])


def _check(codes: Tensor, ids: Tensor, codebook: Tensor) -> None:
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


def _compute(codes: Tensor, ids: Tensor, codebook: Tensor, scale: float) -> Tensor:
    _check(codes, ids, codebook)
    with without_autocast(codebook.device):
        return eager.gather_rows(codes, ids, codebook, scale)


def _compute_backward(
    grad: Tensor, codes: Tensor, ids: Tensor, num_codebooks: int, scale: float
) -> Tensor:
    with without_autocast(grad.device):
        return eager.gather_rows_backward(grad, codes, ids, num_codebooks, scale)


def _shape(codes: Tensor, ids: Tensor, codebook: Tensor, scale: float) -> Tensor:
    _check(codes, ids, codebook)
    return codebook.new_empty(ids.shape[0], codebook.shape[1])


def _shape_backward(
    grad: Tensor, codes: Tensor, ids: Tensor, num_codebooks: int, scale: float
) -> Tensor:
    return grad.new_empty(num_codebooks, grad.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, ids, codebook, ctx.scale = inputs
    ctx.num_codebooks = codebook.shape[0]
    ctx.save_for_backward(codes, ids)


def _gradient(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:
    codes, ids = ctx.saved_tensors
    backward = torch.ops.vqlogits.gather_rows_backward.default
    return None, None, backward(grad, codes, ids, ctx.num_codebooks, ctx.scale), None


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, ids, _, ctx.scale = inputs
    ctx.save_for_backward(codes, ids)


def _gradient_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    codes, ids = ctx.saved_tensors
    # The operation is linear, so the transpose of its transpose is the operation itself.
    rows = torch.ops.vqlogits.gather_rows.default(codes, ids, grad, ctx.scale)
    return rows, None, None, None, None


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
