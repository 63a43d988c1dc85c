"""The whole benchmark on a tiny random model."""

import json
import os
import sys

import pytest

from benchmarks import rounding
from hf_vqlogits.ops import backends, cpu

needs_kernel = pytest.mark.skipif(not cpu.paths(), reason="no CPU kernel is compiled here")


@needs_kernel
def test_results_and_table(tiny_case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounding, "load_case", lambda *_, **__: tiny_case)
    monkeypatch.setattr(rounding, "KEPT_PERCENT", (10.0, 20.0))
    output = tmp_path / "accuracy.json"
    words = ["rounding", "--only", "gpt2-novels", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    rounding.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row["kept_percent"] for row in rows] == [10.0, 20.0]
    for row in rows:
        assert list(row["paths"]) == list(cpu.paths())
        for texts in row["paths"].values():
            figures = texts["novels"]
            assert abs(figures["perplexity_change"]) < 1e-3
            assert figures["same_token"] > 0.95
            assert figures["largest_error"] < 0.02 * figures["largest_logit"]
            assert figures["tokens"] == 160
        exact = row["paths"]["plain"]["novels"]
        assert exact["largest_error"] < 1e-4
        worst = max(texts["novels"]["largest_error"] for texts in row["paths"].values())
        assert (worst > exact["largest_error"]) == (len(cpu.paths()) > 1)
    printed = capsys.readouterr().out
    for path in cpu.paths():
        assert path in printed

    kept = json.loads(output.read_text())
    kept["rows"] = kept["rows"][1:]
    output.write_text(json.dumps(kept))
    rounding.main()  # makes what is missing
    again = json.loads(output.read_text())["rows"]
    assert again[0] == rows[1]
    assert again[1]["kept_percent"] == 10.0


def test_an_implementation_is_forced_for_a_while(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "matmul")
    with rounding.forced("eager"):
        assert backends.requested() == "eager"
    assert backends.requested() == "matmul"
    monkeypatch.delenv(backends.VARIABLE)
    with pytest.raises(RuntimeError, match="stop"), rounding.forced("eager"):
        raise RuntimeError("stop")
    assert backends.VARIABLE not in os.environ


def test_without_a_kernel_there_is_nothing_to_measure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounding.cpu, "paths", lambda: ())
    words = ["rounding", "--output", str(tmp_path / "accuracy.json")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="2"):
        rounding.main()
    assert "no CPU kernel is compiled here" in capsys.readouterr().err
