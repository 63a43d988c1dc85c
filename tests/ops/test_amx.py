"""The AMX path with portable code for its tiles, where the processor has AVX-512 alone."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = "g++"


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or not shutil.which(COMPILER),
    reason=f"needs {COMPILER} on Linux and x86-64",
)
def test_amx_agrees_with_portable_code(tmp_path):
    program = tmp_path / "check"
    source = Path(__file__).with_name("check_amx.cpp")
    flags = ["-O2", "-std=c++17", "-pthread"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode == 77:
        pytest.skip("the processor has no AVX-512")
    assert done.returncode == 0, done.stdout
