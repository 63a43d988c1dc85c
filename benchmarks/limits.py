"""What no kernel can go below on this machine: bytes to move, and look-ups to make."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

READ_BYTES = 512 << 20
ROUNDS = 4_000_000
TRIES = 5
FIELD_BITS = {"avx512": 5, "avx2": 4, "neon": 4}  # of a code, that one look-up takes


@dataclass(frozen=True)
class Rates:
    """Measured rates, of all threads together.

    Attributes:
        bytes_per_second: read from memory that is in no cache.
        lookups_per_second: of 16-bit sums in registers; None where that could not be measured.
    """

    bytes_per_second: float
    lookups_per_second: float | None

    def to_dict(self) -> dict[str, float | None]:
        """For a results file."""
        return asdict(self)

    def seconds(self, *, moved_bytes: int, lookups: int) -> tuple[float, float | None]:
        """Least seconds of a call: by the bytes that it moves, and by its look-ups."""
        rate = self.lookups_per_second
        return moved_bytes / self.bytes_per_second, None if rate is None else lookups / rate


@functools.cache
def measured_rates() -> Rates:
    """Rates of this machine with PyTorch's number of threads, the best of some tries.

    Look-ups are timed on one thread, and taken to add up over threads.
    """
    memory = torch.zeros(READ_BYTES // 4)
    best = min(_seconds_of_a_sum(memory) for _ in range(TRIES))
    return Rates(READ_BYTES / best, _lookup_rate())


def _seconds_of_a_sum(memory: torch.Tensor) -> float:
    start = time.perf_counter()
    memory.sum()
    return time.perf_counter() - start


def _lookup_rate() -> float | None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    source = Path(__file__).with_name("lookup_rate.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "lookup_rate.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source)]
        made = subprocess.run([*command, "-o", str(library)], capture_output=True, check=False)
        if made.returncode:
            return None
        measure = ctypes.CDLL(str(library)).lookups_per_second
        measure.restype, measure.argtypes = ctypes.c_double, [ctypes.c_int64]
        best = max(measure(ROUNDS) for _ in range(TRIES))
    return best * torch.get_num_threads() or None


def lookups(
    vocab_size: int, codebooks: int, fine_tokens: int, path: str, rows: int, *, codewords: int = 2
) -> int:
    """Look-ups that logits take on a path of the kernel, 0 where its tables fit no register.

    Args:
        vocab_size: V.
        codebooks: R of sign codes, G of index codes.
        fine_tokens: tokens with a second code.
        path: of the kernel.
        rows: N.
        codewords: K of index codes, 2 of sign codes.
    """
    indices = FIELD_BITS.get(path, 0) // (codewords - 1).bit_length()
    return rows * (vocab_size + fine_tokens) * -(-codebooks // indices) if indices else 0
