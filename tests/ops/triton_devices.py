"""Where the Triton kernels are tested: in the interpreter, and compiled where there is a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

from hf_vqlogits.ops import triton_tiles

each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(
                not triton_tiles.INTERPRETED, reason="there is a GPU, where kernels are compiled"
            ),
        ),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Tensor cores add in float32, and cut what they add; elsewhere sums are rounded, which is less.
STEP = 2.0**-23


def sum_error(scores, terms, fine=False):
    """Largest error (N, 1) of sums of `terms` numbers of a row, +1, -1, or with second codes 3/2.

    As `triton_expand.expand` says: 16 products at a time are added to what there is, after at most
    32 additions among themselves, three times as often where float32 is cut in three. Each addition
    is off by at most `STEP` of the sums there can be.
    """
    depth = 32 + (3 if scores.dtype == torch.float32 else 1) * -(-terms // 16)
    return depth * STEP * (1.5 if fine else 1) * scores.double().abs().sum(1, keepdim=True)


def rounding(want, dtype):
    """Largest error of numbers rounded to a type.

    Half a step, but Triton's interpreter (3.9.0) cuts bfloat16 numbers instead of rounding them.
    """
    steps = 1 if dtype == torch.bfloat16 and triton_tiles.INTERPRETED else 0.5
    return (
        torch.zeros(()) if dtype == torch.float32 else steps * torch.finfo(dtype).eps * want.abs()
    )


def second_codes(vocabulary, count, num_codebooks):
    """`fine_ids` in no order and `fine_codes`; None without any."""
    import references

    if not count:
        return None, None
    generator = torch.Generator().manual_seed(3)
    ids = torch.randperm(vocabulary, generator=generator)[:count]
    return ids.int(), references.random_sign_codes(count, num_codebooks, seed=4)


def to(device, *tensors):
    return [tensor if tensor is None else tensor.to(device) for tensor in tensors]
