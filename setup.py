"""Declares the optional compiled kernel; everything else stands in setup.cfg."""

import sys

from setuptools import Extension, setup

SOURCES = "hf_vqlogits/ops/csrc"

# A plain C library in the clothes of an extension module: `ops/cpu.py` loads it by ctypes, so it
# needs the headers neither of Python nor of PyTorch. It is optional: where it cannot be compiled,
# the installation goes on and PyTorch operations take its place.
kernel = Extension(
    "hf_vqlogits.ops._expand",
    sources=[f"{SOURCES}/expand.cpp"],
    depends=[
        f"{SOURCES}/{name}.h" for name in ("coding", "parallel", "tables_avx512", "tables_plain")
    ],
    language="c++",
    extra_compile_args=["-O3", "-std=c++17", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)

# The sources keep to what GCC and Clang have in common, which the Windows compiler has not.
setup(ext_modules=[] if sys.platform == "win32" else [kernel])
