import importlib.machinery
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import references
import torch

from hf_vqlogits import ops
from hf_vqlogits.ops import cpu, library

pytestmark = pytest.mark.skipif(not cpu.paths(), reason="the compiled library was not built")
SOURCE = Path(library.__file__).parent / "csrc" / "expand.cpp"


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_sources_are_for_either_compiler(compiler):
    program = shutil.which(compiler)
    if program is None:
        pytest.skip(f"{compiler} is not installed")
    options = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-c", "-o", "/dev/null"]
    run = subprocess.run([program, *options, str(SOURCE)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def no_library(monkeypatch):
    library.load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.load.cache_clear()


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("_EXTENSION", "_missing", "it was not built"),
        ("_INTERFACE", 0, "it was built from other sources"),
    ],
)
def test_without_the_library_pytorch_takes_its_place(attribute, value, reason, no_library, caplog):
    no_library.setattr(library, attribute, value)
    codes, scores = references.random_sign_codes(600, 100), references.random_scores(9, 100)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            got = ops.expand(scores, codes, code_type="sign")
    assert [record.getMessage().count(reason) for record in caplog.records] == [1]
    want = references.logits(scores, codes, "sign")
    torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-5)
    values, tokens = ops.largest(got, 3)
    assert torch.equal(values, got.topk(3).values)
    assert torch.equal(values, got.gather(1, tokens))


def test_a_library_that_cannot_be_loaded_is_left(no_library, caplog, tmp_path):
    (tmp_path / f"_expand{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_text("no library")
    no_library.setattr(library, "__file__", str(tmp_path / "library.py"))
    with caplog.at_level(logging.WARNING):
        assert cpu.paths() == ()
    assert "is not used: " in caplog.text


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(),
    reason="PyTorch without GNU OpenMP's interface",
)
def test_the_kernels_run_on_the_threads_of_torch():
    found = []

    class Library:
        vqlogits_use_openmp = staticmethod(found.append)

    library.use_threads_of_torch(Library)
    assert len(found) == 1
    assert found[0].value
