"""Declares the optional compiled parts; everything else stands in setup.cfg."""

import sys

from setuptools import Extension, setup


def library(name: str, source: str, headers: tuple[str, ...] = ()) -> Extension:
    """A plain C library in the clothes of an extension module.

    It is loaded by ctypes, so it needs the headers neither of Python nor of PyTorch. It is
    optional: where it cannot be compiled, the installation goes on without it.
    """
    folder = source.rpartition("/")[0]
    return Extension(
        name,
        sources=[source],
        depends=[f"{folder}/{header}.h" for header in headers],
        language="c++",
        # For any processor of its kind, not for the one at hand: a wheel may travel. No debugging
        # symbols, which would be most of the file.
        extra_compile_args=["-O3", "-std=c++17", "-pthread", "-g0"],
        extra_link_args=["-pthread"],
        optional=True,
    )


libraries = [
    library(
        "hf_vqlogits.ops._expand",
        "hf_vqlogits/ops/csrc/expand.cpp",
        (
            "coding",
            "kernel_amx",
            "kernel_avx512",
            "kernel_bytes",
            "largest",
            "layout",
            "numbers",
            "pages",
            "parallel",
            "refine",
            "signs",
            "tables_kernel",
            "tables_plain",
        ),
    ),
    library("hf_vqlogits.conversion._sign_search", "conversion/csrc/sign_search.cpp"),
]

# The sources keep to what GCC and Clang have in common, which the Windows compiler has not.
setup(ext_modules=[] if sys.platform == "win32" else libraries)
