import sys

import pytest
import torch

from benchmarks import speed_gpu


@pytest.fixture
def small_head(monkeypatch):
    """A small layer on the processor, with a memory that is not counted."""
    for name, value in (("VOCAB_SIZE", 300), ("HIDDEN_SIZE", 32), ("FINE_TOKENS", 9)):
        monkeypatch.setattr(speed_gpu, name, value)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    return speed_gpu.make_head(20, torch.device("cpu")), torch.randn(300, 32).bfloat16()


def test_logits_and_loss_are_timed(small_head):
    logits = speed_gpu.measure_logits(*small_head, 2)
    loss = speed_gpu.measure_loss(*small_head, 8)
    for found in (logits, loss):
        assert found["bits"] == 20
        times = found["milliseconds"]
        assert found["times_faster"] == times["dense"] / times["quantised"] > 0
    assert loss["bytes"] == {"dense": 0, "quantised": 0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["speed_gpu", "--output", str(tmp_path / "never.json")])
    with pytest.raises(SystemExit, match="2"):
        speed_gpu.main()
    assert "there is no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
