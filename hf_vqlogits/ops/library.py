"""The compiled CPU library: finding it, checking it, and what its functions take.

It is built from `csrc/` when the package is installed, if there is a C++ compiler. Being a plain C
library it is bound to no version of PyTorch.
"""

import ctypes
import functools
import importlib.machinery
import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_INTERFACE = 9  # `kInterface` in csrc/expand.cpp
_EXTENSION = "_expand"  # in setup.py


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library; None, with one warning, where there is none that works."""
    places = [
        Path(__file__).with_name(_EXTENSION + suffix)
        for suffix in importlib.machinery.EXTENSION_SUFFIXES
    ]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        reason = "it was not built"
    else:
        try:
            library = ctypes.CDLL(str(found))
            interface = library.vqlogits_interface()
        except (OSError, AttributeError) as error:
            reason = str(error)
        else:
            if interface == _INTERFACE:
                _declare(library)
                use_threads_of_torch(library)
                return library
            reason = f"it was built from other sources (interface {interface}, not {_INTERFACE})"
    logger.warning(
        "The compiled CPU kernel of hf_vqlogits is not used: %s. PyTorch operations take its "
        "place, slower at few rows. Reinstall the package where there is a C++ compiler.",
        reason,
    )
    return None


def _declare(library: ctypes.CDLL) -> None:
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    for name, result, arguments in (
        ("has", int32, (int32,)),
        ("use_openmp", None, (pointer,)),
        ("tile_bytes", int64, (int32, pointer)),
        ("task_tokens", int64, ()),
        ("block_tokens", int64, ()),
        ("tile", None, (int32, pointer, pointer, pointer, int32)),
        ("tile_fine", None, (int32, pointer, pointer, pointer, pointer, int32)),
        ("expand_tiles", int32, (int32, *[pointer] * 4, int64, int32, pointer, int32)),
        ("logits_tiles", int32, (int32, *[pointer] * 4, int64, int32, pointer, int32)),
        ("largest", int32, (pointer, int32, *[int64] * 3, pointer, pointer, int32)),
        ("refine", int32, (pointer, pointer, int32, int32, pointer, int32)),
        ("expand_plain", int32, (pointer, pointer, pointer, int64, pointer, int32)),
        ("unpack", None, (pointer, int64, int32, pointer, int32)),
    ):
        function = getattr(library, f"vqlogits_{name}")
        function.restype, function.argtypes = result, arguments


def use_threads_of_torch(library: ctypes.CDLL) -> None:
    """Let the kernels run on the threads that PyTorch already has (why: csrc/parallel.h)."""
    # A symbol is looked up in a library and then in those that it was linked with: this finds the
    # very OpenMP runtime of this PyTorch, under whatever name its package carries it.
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
            start = torch_library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        library.vqlogits_use_openmp(ctypes.cast(start, ctypes.c_void_p))
        return
