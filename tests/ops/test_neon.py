"""The NEON path in an emulator, where the processor is of another kind."""

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_neon_agrees_with_portable_code(tmp_path):
    program = tmp_path / "check"
    source = Path(__file__).with_name("check_neon.cpp")
    flags = ["-O2", "-std=c++17", "-static", "-pthread"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run(
        [EMULATOR, str(program)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout
