"""Who computes an operation.

The environment variable `VQLOGITS_BACKEND` forces one, for tests and comparisons:

    auto     the default: the fastest for the device, the codes and the scores
    eager    PyTorch operations, sign codes unpacked piece by piece
    matmul   sign codes as a product with the kept +-1 matrix, index codes as `eager`
    cpu      the compiled kernel, by the fastest path that the processor has
    amx      the compiled kernel, products of 8-bit tiles (sign codes of many rows)
    avx512   the compiled kernel, 16-bit tables in AVX-512 registers
    avx2     the same with tables of half the size, in AVX2 registers
    neon     the same, in NEON registers
    plain    the compiled kernel, portable C++
    triton   the GPU kernels, which read the codes themselves

On the CPU the gradient of sign codes is a product with a matrix that the compiled library writes
out, by every compiled name and by `auto`. For index codes there is no kernel of the gradient, and
in `triton` none of the loss: PyTorch computes them.
"""

import os

import torch
from torch import Tensor, nn

from . import cpu, matmul, triton_backend
from .library import load

COMPILED = ("cpu", *cpu.LARGEST_CODEBOOKS, "plain")
BACKENDS = ("auto", "eager", "matmul", *COMPILED, "triton")
VARIABLE = "VQLOGITS_BACKEND"
_PLAIN = (Tensor, nn.Parameter)


def requested() -> str:
    """The value of `VQLOGITS_BACKEND`.

    Raises:
        ValueError: it is no backend.
    """
    name = os.environ.get(VARIABLE, "auto")
    if name not in BACKENDS:
        raise ValueError(
            f"The environment variable {VARIABLE} is {name!r}, which is no backend; set it to one "
            f"of {', '.join(BACKENDS)}, or unset it."
        )
    return name


def callable_directly(*tensors: Tensor) -> bool:
    """Whether a compiled function may take tensors past PyTorch's dispatcher.

    They lie on the CPU, and there is nobody who has to see the operation: no gradient, no tracing,
    no autocast, no `torch.func`, no subclass (of FSDP, of quantisation) that does with it what it
    must.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()
        or torch._C._functorch.maybe_current_level() is not None
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    ):
        return False
    return all(type(tensor) in _PLAIN and tensor.is_cpu for tensor in tensors)


def may_use_library() -> bool:
    """Whether the compiled library is there, and no backend is forced that is PyTorch's own.

    Raises:
        ValueError: `VQLOGITS_BACKEND` is unknown.
    """
    return requested() not in ("eager", "matmul") and load() is not None


def for_expand(scores: Tensor, codes: Tensor, code_type: str) -> str:
    """`eager`, `matmul`, `triton` or one of [`cpu.paths`] for the logits of these scores.

    Raises:
        ValueError: `VQLOGITS_BACKEND` is unknown.
        RuntimeError: it forces a compiled path that is missing or does not know such tensors.
    """
    name = requested()
    # The kernels win at any number of rows, so there is no crossover to look for. V 50,257, R 500,
    # 2 cores: avx512 0.16, 5.1, 39 ms for 1, 64, 256 rows, against 13, 28, 82 ms for the product
    # with unpacked signs. Without AVX-512 in the product either, plain takes 0.9, 21, 110, 410 ms
    # for 1, 64, 256, 1,024 rows, against 13, 41, 134, 504 ms.
    if name == "auto" or name in COMPILED:
        for path in cpu.paths() if scores.device.type == "cpu" else ():
            wins = name in ("auto", "cpu") and len(scores) >= cpu.LEAST_ROWS.get(path, 0)
            if (wins or name == path) and cpu.supports(path, scores, codes, code_type):
                return path
    if name in COMPILED:
        raise RuntimeError(
            f"{VARIABLE}={name} cannot be obeyed: this machine has the compiled paths "
            f"{list(cpu.paths())}, the scores are {scores.dtype} {tuple(scores.shape)} on "
            f"{scores.device}. The kernels take float32, bfloat16 and float16 on the CPU; avx512 "
            "at most 32 codewords a codebook, avx2 and neon 16, amx sign codes alone, and none of "
            "these codes made under `torch.inference_mode()`. Unset the variable to have a backend "
            "chosen."
        )
    if _takes_triton(name, scores, codes):
        return "triton"
    if name == "triton":
        reason = triton_backend.obstacle(scores.device)
        raise RuntimeError(
            f"{VARIABLE}={name} cannot be obeyed: the scores are {scores.dtype} "
            f"{tuple(scores.shape)} on {scores.device}{f' ({reason})' if reason else ''}. The "
            "kernels take float32, bfloat16 and float16, and no codes made under "
            "`torch.inference_mode()`. Unset the variable to have a backend chosen."
        )
    return _without_kernel(name, scores, codes, code_type, scores.shape[1])


def for_expand_backward(grad: Tensor, codes: Tensor, code_type: str, num_codebooks: int) -> str:
    """`eager`, `matmul`, `cpu` or `triton` for the gradient of scores with G or R codebooks.

    Raises:
        ValueError: `VQLOGITS_BACKEND` is unknown.
    """
    name = requested()
    if code_type == "sign" and _takes_triton(name, grad, codes):
        return "triton"
    if name not in ("eager", "matmul") and grad.device.type == "cpu" and cpu.paths():
        # Nothing else keeps the +-1 matrix then, and to unpack it costs a fraction of the product.
        signs = code_type == "sign" and grad.dtype in cpu.TYPES
        return "cpu" if signs else "eager"
    return _without_kernel(name, grad, codes, code_type, num_codebooks)


def for_cross_entropy(scores: Tensor, codes: Tensor, code_type: str) -> str:
    """`triton`, or `chunked` for logits of a chunk of rows at a time by [`for_expand`].

    Raises:
        ValueError: `VQLOGITS_BACKEND` is unknown.
    """
    if code_type == "sign" and _takes_triton(requested(), scores, codes):
        return "triton"
    return "chunked"


def _takes_triton(name: str, tensor: Tensor, codes: Tensor) -> bool:
    wanted = name == "triton" or (name == "auto" and tensor.device.type == "cuda")
    return wanted and triton_backend.supports(tensor, codes)


def _without_kernel(
    name: str, tensor: Tensor, codes: Tensor, code_type: str, num_codebooks: int
) -> str:
    if name == "eager" or code_type == "index":
        return "eager"
    kept = name == "matmul" or matmul.fits(codes, num_codebooks, tensor.dtype)
    return "matmul" if kept else "eager"
