"""Compile every Triton kernel for two generations of GPUs, none of which need be there.

A script, because a process in which kernels are interpreted cannot compile them.
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_vqlogits.ops import triton_cross_entropy, triton_expand

# Bytes of shared memory that a program may have: on the GPUs of capability 8.6 and 8.9, which run
# code for 8.0 and have the least, and on 9.0.
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10}
POINTERS = {
    "words": "*i32",
    "fine_words": "*i32",
    "tokens": "*i32",
    "places": "*i64",
    "codes": "*u8",
    "logsumexp": "*fp32",
    "found": "*fp32",
    "sums_of_pieces": "*fp32",
}
NUMBERS = dict.fromkeys(("scale", "cap", "on_label", "on_all", "z_loss"), "fp32")
MULTIPLES_OF_16 = ("words_stride", "fine_stride", "part_stride")


def compile_kernel(kernel, capability, pointers, constants, warps):
    """Compile, and check the shared memory."""
    names = kernel.arg_names
    types = POINTERS | NUMBERS | pointers
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in MULTIPLES_OF_16]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    shared = compiled.metadata.shared
    assert shared <= SHARED_BYTES[capability], (kernel.__name__, capability, constants, shared)


def compile_all(capability, dtype, fine):
    """Every kernel in the largest tiles that it is launched with."""
    exact = dtype == "fp32"
    tiles = {
        "PARTS": 3 if exact else 1,
        "WORDS": 2,
        "BLOCK_V": 128,
        "HAS_FINE": fine,
        "OPERAND": tl.float16 if dtype == "fp16" else tl.bfloat16,
    }
    parts = {"score_parts": "*fp16" if dtype == "fp16" else "*bf16"}
    output = {"logits": f"*{dtype}"}
    large = tiles | {"BLOCK_N": 64 if exact else 128}
    compile_kernel(triton_expand._product_kernel, capability, parts | output, large, 8)
    grad = {"grad": f"*{dtype}"}
    compile_kernel(triton_expand._gradient_kernel, capability, grad, large | {"BLOCK_V": 64}, 8)
    tables = {"BLOCK_V": 256, "WORDS": 2, "HAS_FINE": fine}
    scores = {"scores": "*fp32"}
    compile_kernel(triton_expand._look_up_kernel, capability, scores | output, tables, 4)
    loss = tiles | {"BLOCK_N": 64, "CAPPED": fine}
    compile_kernel(triton_cross_entropy._loss_kernel, capability, parts, loss, 8)
    loss |= {"GRADIENT_PARTS": 3 if exact else 2}
    compile_kernel(triton_cross_entropy._gradient_kernel, capability, parts, loss, 8)
    if not fine:
        scores = {"scores": f"*{dtype}"}
        compile_kernel(
            triton_expand._index_kernel, capability, scores | output, {"BLOCK_V": 256}, 4
        )


if __name__ == "__main__":
    for capability, dtype, fine in (
        (80, "fp32", True),
        (90, "bf16", False),
        (90, "fp16", True),
    ):
        compile_all(capability, dtype, fine)
    # Triton compiles sizes of 1 as constants, another program.
    ones = dict.fromkeys(("rows", "vocabulary", "num_codebooks", "num_fine", "row_stride"), 1)
    ones |= {"tiles_a_piece": 1, "PARTS": 1, "WORDS": 2, "BLOCK_N": 16, "BLOCK_V": 64}
    ones |= {"HAS_FINE": True, "OPERAND": tl.bfloat16}
    compile_kernel(triton_expand._gradient_kernel, 90, {"grad": "*bf16"}, ones, 4)
    del ones["row_stride"], ones["num_codebooks"]
    loss = ones | {"CAPPED": False, "kind_stride": 1}
    compile_kernel(triton_cross_entropy._loss_kernel, 90, {"score_parts": "*bf16"}, loss, 4)
