"""The whole benchmark on a small layer."""

import json
import sys

import pytest
import torch

from benchmarks import speed, warm_cold
from benchmarks.limits import Rates
from benchmarks.speed import Point
from hf_vqlogits.conversion import timing


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "REPEATS", 1)
    monkeypatch.setattr(warm_cold, "OTHER_BYTES", 4096)
    monkeypatch.setattr(speed, "measured_rates", lambda: Rates(1e9, 2e9))


def test_results_plot_and_text(quick, tmp_path, monkeypatch, capsys):
    output = tmp_path / "speed.json"
    monkeypatch.setattr(sys, "argv", ["speed", "--quick", "--output", str(output)])
    speed.main()
    result = json.loads(output.read_text())
    assert result["rates"] == {"bytes_per_second": 1e9, "lookups_per_second": 2e9}
    row, index = result["rows"]
    assert (index["num_codebooks"], index["codebook_size"], index["fine_tokens"]) == (25, 16, 0)
    assert (row["vocab_size"], row["bits"], row["rows"]) == (5000, 100, 1)
    moved = 5000 * 13 + 500 * (13 + 4) + 4 * 100 * 129 + 4 * 5000
    assert row["limit_milliseconds"]["bytes"] == pytest.approx(1e3 * moved / 1e9)
    for state in ("warm", "cold"):
        times = row[state]["milliseconds"]
        assert {"quantised", "dense_float32", "dense_bfloat16", "int8"} < times.keys()
        assert min(times.values()) > 0
        ratio = times["dense_float32"] / times["quantised"]
        assert row[state]["times_faster_than_float32"] == ratio
    (loss,) = result["loss"]
    assert {"quantised", "adaptive softmax"} < loss["milliseconds"].keys()
    assert loss["times_faster_than_float32"] > 0
    assert set(result["scaling"]) == {"rows"}
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "faster than float32 / bfloat16" in printed
    assert "V 5,000, d 128, G = 25, K = 16, N 1" in printed
    assert "Faiss fast-scan" in printed


def test_threads_are_set_for_a_point_alone(quick):
    before = torch.get_num_threads()
    point = Point(vocab_size=300, hidden_size=16, bits=9, threads=1)
    row = speed.measure(point, Rates(1e9, None), seed=0)
    assert row["threads"] == 1
    assert torch.get_num_threads() == before
    assert row["limit_milliseconds"]["lookups"] is None


def test_the_scaling_covers_all_threads():
    points = speed.scaling_points()
    assert points["threads"][-1].threads == torch.get_num_threads()
    assert points["threads"][0].threads == 1
    assert max(point.vocab_size for point in points["vocab_size"]) == 1 << 20
