"""[`refine`] by the compiled library, in one call.

Of one row there is so little to compute that the operations of PyTorch, two dozen of them, take
longer than what they do.
"""

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .cpu import TYPES
from .library import load

if TYPE_CHECKING:
    from .refining import Dense, Offset, Rule


class _Numbers(ctypes.Structure):
    """`Numbers` in csrc/numbers.h."""

    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int32))


class _Refining(ctypes.Structure):
    """`Refining` in csrc/refine.h."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", _Numbers),
        ("common", _Numbers),
        ("common_bias", _Numbers),
        ("rows", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("logit_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class _Rule(ctypes.Structure):
    """`Rule` in csrc/refine.h."""

    _fields_ = (
        ("error", _Numbers),
        ("mean", _Numbers),
        ("spread", _Numbers),
        ("deviations", ctypes.c_float),
    )


def knows(
    hidden: Tensor, logits: Tensor, dense: "Dense", offset: "Offset", rule: "Rule | None"
) -> bool:
    """Whether the library can read such arguments of [`refine`], and none of them is too short."""
    rows, vocabulary = logits.shape
    weight, bias = dense[:2]
    size = weight.shape[1]
    # An input embedding may have rows behind those of the vocabulary.
    of_tokens, of_states = [bias], [offset.common]
    if rule is not None:
        of_tokens.append(rule.error)
        of_states += rule[2:]
    if (
        hidden.shape != (rows, size)
        or hidden.dtype not in TYPES
        or any(len(tensor) < vocabulary for tensor in (weight, *of_tokens))
        or any(tensor.shape != (size,) for tensor in of_states)
    ):
        return False
    others = (logits, weight, offset.bias, *of_tokens, *of_states)
    return all(tensor.dtype in TYPES and tensor.is_contiguous() for tensor in others)


def refine_(
    hidden: Tensor,
    logits: Tensor,
    top_k: int,
    dense: "Dense",
    offset: "Offset",
    rule: "Rule | None",
) -> Tensor:
    """[`refine`] in place; products are taken in float32, and what is stored is rounded.

    Raises:
        MemoryError: there is no memory for the candidates.
    """
    library = load()
    assert library is not None
    exact = hidden.float().contiguous()
    given = _Refining(
        exact.data_ptr(),
        dense.weight.data_ptr(),
        _numbers(dense.bias),
        *map(_numbers, offset),
        *(*logits.shape, exact.shape[1], top_k),
        *(dense.logit_scale, dense.softcap or 0.0),
    )
    its_rule = None
    if rule is not None:
        its_rule = ctypes.byref(_Rule(*map(_numbers, rule[1:]), rule.deviations))
    failed = library.vqlogits_refine(
        ctypes.byref(given),
        its_rule,
        TYPES[dense.weight.dtype],
        TYPES[logits.dtype],
        logits.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the {top_k} candidates of {len(logits)} rows")
    if not logits.is_inference():
        increment_version(logits)  # so that autograd notices, should it have kept them
    return logits


def _numbers(tensor: Tensor) -> _Numbers:
    return _Numbers(tensor.data_ptr(), TYPES[tensor.dtype])
