import logging
import subprocess
import sys

import pytest
import references
import torch

from hf_vqlogits import ops
from hf_vqlogits.ops import backends, triton_backend

GPU = torch.device("cuda", 0)
WITHOUT_TRITON = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import torch
from hf_vqlogits import ops
from hf_vqlogits.ops import triton_backend
scores, codes = torch.ones(2, 8), torch.full((3, 1), 255, dtype=torch.uint8)
assert (ops.expand(scores, codes, code_type="sign") - 8).abs().max() < 0.1
assert "pip install '.[gpu]'" in triton_backend.obstacle(torch.device("cpu"))
"""


@pytest.fixture
def forget(monkeypatch):
    """Let what was found out about devices be forgotten, before and after."""

    def clear():
        triton_backend.obstacle.cache_clear()
        triton_backend._warn.cache_clear()

    clear()
    yield monkeypatch
    monkeypatch.undo()
    clear()


def test_everything_else_works_without_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


def test_a_gpu_without_triton_is_told_once(forget, caplog):
    forget.setitem(sys.modules, "triton.errors", None)
    with caplog.at_level(logging.WARNING):
        for index in (0, 1, 0):
            assert not triton_backend.usable(torch.device("cuda", index))
    assert [record.getMessage().count("[gpu]'`") for record in caplog.records] == [1]


def test_a_processor_without_triton_is_not_told(forget, caplog):
    forget.setitem(sys.modules, "triton.errors", None)
    with caplog.at_level(logging.WARNING):
        assert not triton_backend.usable(torch.device("cpu"))
    assert not caplog.records


class TestWithTriton:
    @pytest.fixture(autouse=True)
    def triton(self):
        pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

    def test_an_old_gpu_is_told(self, forget, caplog):
        forget.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not triton_backend.usable(GPU)
        assert "compute capability 8.0 or more, not (7, 5)" in caplog.text

    @pytest.mark.parametrize("error", [RuntimeError("no C compiler"), OSError("no driver")])
    def test_kernels_that_do_not_start_are_left(self, error, forget, caplog):
        from hf_vqlogits.ops import triton_expand

        def fail(*arguments, **options):
            raise error

        forget.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        forget.setattr(torch, "full", fail)
        forget.setattr(triton_expand, "expand", fail)
        assert not triton_backend.usable(GPU)
        assert f"are not used: {type(error).__name__}: {error}" in caplog.text

    def test_without_the_interpreter_the_processor_is_no_device(self, forget):
        from hf_vqlogits.ops import triton_tiles

        forget.setattr(triton_tiles, "INTERPRETED", False)
        assert not triton_backend.usable(torch.device("cpu"))
        forget.setenv(backends.VARIABLE, "triton")
        scores, codes = references.random_scores(2, 20), references.random_sign_codes(30, 20)
        with pytest.raises(RuntimeError, match="they run on GPUs, not on cpu"):
            ops.expand(scores, codes, code_type="sign")

    def test_other_devices_have_no_kernels(self):
        assert not triton_backend.usable(torch.device("meta"))
