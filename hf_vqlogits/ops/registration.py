"""The operation as PyTorch sees it: its name, its shapes and its gradient.

    torch.ops.vqlogits.expand(scores, codes, code_type, fine_ids, fine_codes) -> logits
    torch.ops.vqlogits.expand_backward(grad, codes, code_type, fine_ids, fine_codes, shape)
        -> grad of the scores

Registered operators are opaque to `torch.compile`, so that no graph breaks at a kernel.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import backends, cpu, eager, matmul

# `Library` rather than `custom_op`: 5 to 8 microseconds a call instead of 12, where one row of
# logits takes some 150. CUDA graphs may not record what reads the environment and keeps matrices.
LIBRARY = torch.library.Library("vqlogits", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
FINE = "Tensor? fine_ids, Tensor? fine_codes"
CODES = f"Tensor codes, str code_type, {FINE}"
LIBRARY.define(f"expand(Tensor scores, {CODES}) -> Tensor", tags=TAGS)
LIBRARY.define(f"expand_backward(Tensor grad, {CODES}, SymInt[] shape) -> Tensor", tags=TAGS)


def expand(
    scores: Tensor,
    codes: Tensor,
    *,
    code_type: str,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
) -> Tensor:
    """Sum the scores that every token's code names: logits.

    For sign codes equivalent to `scores @ S.T` with `S = unpack_signs(codes, R)`, to whose rows
    `fine_ids` half of `unpack_signs(fine_codes, R)` is added; for index codes to
    `sum(scores[:, g, codes[:, g].int()] for g in range(G))`. Differentiable in `scores`.

    Args:
        scores: (N, R) with sign codes, (N, G, K) with index codes.
        codes: sign codes uint8 (V, ceil(R / 8)); index codes (V, G), uint8 or int32.
        code_type: `"sign"` or `"index"`.
        fine_ids: (F,), tokens with a second sign code, each once; or None.
        fine_codes: uint8 (F, ceil(R / 8)), those codes; they count half.

    Returns:
        Logits (N, V) in the type of `scores`. Sums of bfloat16 and float16 are taken in float32.
        The kernels for AVX-512, AVX2 and NEON have an error below 0.5% of the deviation of a row's
        logits, and make a row with NaN or infinite scores NaN as a whole.

    Raises:
        TypeError: a tensor has a type that the operation does not know.
        ValueError: shapes or devices do not go together, second codes come with index codes or
            without their tokens, `code_type` is unknown, or the environment variable
            `VQLOGITS_BACKEND`, which forces a backend, is (see `backends.py`).
        RuntimeError: that variable forces a kernel that is missing or does not know such tensors.
        IndexError: an index code lies outside 0..K-1 (by the kernels; elsewhere whatever
            PyTorch's own indexing raises on the device).
    """
    logits: Tensor = torch.ops.vqlogits.expand.default(
        scores, codes, code_type, fine_ids, fine_codes
    )
    return logits


def compute_expand(
    scores: Tensor,
    codes: Tensor,
    code_type: str,
    fine_ids: Tensor | None,
    fine_codes: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """[`expand`] below autograd, by the backend that was chosen, which may write to `out`."""
    check(scores, codes, code_type, fine_ids, fine_codes)
    backend = backends.for_expand(scores, codes, code_type)
    if backend in cpu.LARGEST_CODEBOOKS:
        return cpu.expand(scores, codes, code_type, backend, fine_ids, fine_codes, out)
    if backend == "triton":
        from . import triton_expand  # which cannot be imported without Triton

        return triton_expand.expand(scores, codes, code_type, fine_ids, fine_codes)
    if fine_ids is None or fine_codes is None:
        return _expand_codes(scores, codes, code_type, backend)
    exact = scores.to(eager.sum_dtype(scores.dtype))  # two sums, to be rounded once
    logits = _expand_codes(exact, codes, code_type, backend)
    fine_logits = _expand_codes(exact, fine_codes, code_type, backend)
    return eager.add_fine_(logits, fine_logits, fine_ids).to(scores.dtype)


def _expand_codes(scores: Tensor, codes: Tensor, code_type: str, backend: str) -> Tensor:
    if backend == "plain":
        return cpu.expand(scores, codes, code_type, backend)
    with without_autocast(scores.device):
        if backend == "matmul":
            return matmul.expand(scores, codes)
        return eager.expand(scores, codes, code_type)


def compute_expand_backward(
    grad: Tensor,
    codes: Tensor,
    code_type: str,
    fine_ids: Tensor | None,
    fine_codes: Tensor | None,
    shape: tuple[int, ...],
) -> Tensor:
    """Gradient of [`expand`] with respect to scores of the given shape."""
    if backends.for_expand_backward(grad, codes, code_type, shape[1]) == "triton":
        from . import triton_expand  # which cannot be imported without Triton

        return triton_expand.expand_backward(grad, codes, shape[1], fine_ids, fine_codes)
    sums = _expand_codes_backward(grad, codes, code_type, shape)
    if fine_ids is not None and fine_codes is not None:
        fine_grad = grad.index_select(1, fine_ids)
        fine_sums = _expand_codes_backward(fine_grad, fine_codes, code_type, shape)
        sums.add_(fine_sums, alpha=eager.FINE_FACTOR)
    return sums.to(grad.dtype)


def _expand_codes_backward(
    grad: Tensor, codes: Tensor, code_type: str, shape: tuple[int, ...]
) -> Tensor:
    backend = backends.for_expand_backward(grad, codes, code_type, shape[1])
    with without_autocast(grad.device):
        if backend == "cpu":
            return cpu.expand_backward(grad, codes, shape[1])
        if backend == "matmul":
            return matmul.expand_backward(grad, codes, shape[1])
        return eager.expand_backward(grad, codes, code_type, shape)


def check(
    scores: Tensor,
    codes: Tensor,
    code_type: str,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
) -> None:
    """Raise what [`expand`] documents, as far as it can be told without reading the tensors."""
    if code_type not in eager.CODE_TYPES:
        raise ValueError(
            f"`code_type` is {code_type!r}; it must be {' or '.join(eager.CODE_TYPES)}."
        )
    sign = code_type == "sign"
    if scores.dim() != (2 if sign else 3) or 0 in scores.shape[1:]:
        wanted = "(N, R) with R >= 1" if sign else "(N, G, K) with G, K >= 1"
        raise ValueError(
            f"`scores` has shape {tuple(scores.shape)}, but {code_type} codes take {wanted}; "
            "flatten the leading dimensions to N."
        )
    width = (scores.shape[1] + 7) // 8 if sign else scores.shape[1]
    if codes.dim() != 2 or codes.shape[1] != width:
        raise ValueError(
            f"`codes` has shape {tuple(codes.shape)}, but scores of shape {tuple(scores.shape)} "
            f"take {code_type} codes of shape (V, {width})."
        )
    if not scores.is_floating_point():
        raise TypeError(f"`scores` is {scores.dtype}; it must have a floating-point type.")
    if codes.dtype is not torch.uint8 and (sign or codes.dtype is not torch.int32):
        allowed = "uint8" if sign else "uint8 or int32"
        raise TypeError(f"`codes` is {codes.dtype}; {code_type} codes must be {allowed}.")
    if scores.device != codes.device:
        raise ValueError(
            f"`scores` is on {scores.device} but `codes` on {codes.device}; move one to the other."
        )
    check_fine(codes, code_type, fine_ids, fine_codes)


def check_fine(
    codes: Tensor, code_type: str, fine_ids: Tensor | None, fine_codes: Tensor | None
) -> None:
    """Raise what [`expand`] documents of second codes, where there are any."""
    if fine_ids is None and fine_codes is None:
        return
    if code_type != "sign":
        raise ValueError("Second codes (`fine_ids`, `fine_codes`) go with sign codes only.")
    if fine_ids is None or fine_codes is None:
        raise ValueError("`fine_ids` and `fine_codes` go together; give both or none.")
    wanted = (len(fine_ids), codes.shape[1])
    if fine_ids.dim() != 1 or tuple(fine_codes.shape) != wanted:
        raise ValueError(
            f"`fine_ids` has shape {tuple(fine_ids.shape)} and `fine_codes` "
            f"{tuple(fine_codes.shape)}; with codes of {codes.shape[1]} bytes they must be (F,) "
            f"and (F, {codes.shape[1]})."
        )
    if fine_codes.dtype is not torch.uint8 or fine_ids.is_floating_point():
        raise TypeError(
            f"`fine_codes` is {fine_codes.dtype} and `fine_ids` {fine_ids.dtype}; they must be "
            "uint8 and integers."
        )
    for name, tensor in (("fine_ids", fine_ids), ("fine_codes", fine_codes)):
        if tensor.device != codes.device:
            raise ValueError(
                f"`{name}` is on {tensor.device} but `codes` on {codes.device}; move one to the "
                "other."
            )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Keep what is computed inside in the type that was chosen for it."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _keep_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensor, codes, ctx.code_type, fine_ids, fine_codes, *_ = inputs
    ctx.shape = tensor.shape
    ctx.save_for_backward(codes, fine_ids, fine_codes)


def _gradient_of_expand(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, *fine = ctx.saved_tensors
    backward = torch.ops.vqlogits.expand_backward.default
    return backward(grad, codes, ctx.code_type, *fine, ctx.shape), *[None] * 4


def _gradient_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, *fine = ctx.saved_tensors
    # The operation is linear, so the transpose of its transpose is the operation itself.
    return torch.ops.vqlogits.expand.default(grad, codes, ctx.code_type, *fine), *[None] * 5


def _shape_of_expand(scores: Tensor, codes: Tensor, *others: Any) -> Tensor:
    check(scores, codes, *others)
    return scores.new_empty(scores.shape[0], codes.shape[0])


def _shape_of_backward(grad: Tensor, *options: Any) -> Tensor:
    return grad.new_empty(options[-1])


for _name, _compute, _shape, _gradient in (
    ("expand", compute_expand, _shape_of_expand, _gradient_of_expand),
    ("expand_backward", compute_expand_backward, _shape_of_backward, _gradient_of_backward),
):
    LIBRARY.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vqlogits::{_name}", _shape, lib=LIBRARY)
    torch.library.register_autograd(
        f"vqlogits::{_name}", _gradient, setup_context=_keep_codes, lib=LIBRARY
    )
