"""This package's heads, and the paper's k-means, which it offers as well.

They are judged by the dense layer that they stand for, as all peers are: no rounding by a kernel
counts, neither ours nor a peer's.
"""

import copy
from typing import Any

import torch

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.conversion.sizes import choose_size

from .layer import HALF, Compressed, Layer, packed_bytes, through


def fitted_head(layer: Layer, method: str, reduction: float, **options: Any) -> VQLogitsHead:
    """A head that keeps `1 - reduction` of the float parameters, as the converter fits it.

    Args:
        layer: the dense layer.
        method: one of the converter's.
        reduction: `param_reduction`.
        options: more of `choose_size`.
    """
    vocab_size, hidden_size = layer.weight.shape
    size = choose_size(
        method,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        param_reduction=reduction,
        **options,
    )
    if method == "signs":
        return layer.quantiser.sign_heads([size], layer.statistics)[size]
    return layer.quantiser.index_head(size, method, layer.statistics)


@torch.no_grad()
def half_precision(head: VQLogitsHead, **details: Any) -> Compressed:
    """The head with codewords and their biases in bfloat16.

    Index codes are counted in bits without gaps, which is less than their file takes (whole bytes,
    or four where K > 256).
    """
    rounded = copy.deepcopy(head)
    rounded.codebook.copy_(through(head.codebook, torch.bfloat16))
    rounded.codebook_bias.copy_(through(head.codebook_bias, torch.bfloat16))
    storage = head.storage()
    codes = storage["codes_bytes"]
    if head.code_type == "index":
        codes = packed_bytes(head.out_features, storage["bits_per_token"])
    weight, bias = rounded.to_linear()
    return Compressed(
        weight,
        codes + HALF * storage["float_parameters"],
        bias,
        {"bits_per_token": storage["bits_per_token"], "storage": storage, **details},
    )


def full_precision(head: VQLogitsHead, **details: Any) -> Compressed:
    """The head as the converter reports it: codewords in float32, bytes as in the file."""
    storage = head.storage()
    weight, bias = head.to_linear()
    return Compressed(
        weight,
        storage["total_bytes"],
        bias,
        {"bits_per_token": storage["bits_per_token"], "storage": storage, **details},
    )
