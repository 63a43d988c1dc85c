import json
import sys

import pytest

from benchmarks import memory

pytestmark = pytest.mark.skipif(not memory.PEAK_RESET.exists(), reason="Linux alone has it")


def test_results_and_table(tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "memory.json"
    monkeypatch.setattr(sys, "argv", ["memory", "--quick", "--output", str(output)])
    monkeypatch.setattr(memory, "LAYERS", ("quantised", "dense_float32", "dense_bfloat16"))
    memory.main()
    result = json.loads(output.read_text())
    assert (result["vocab_size"], result["hidden_size"], result["bits"]) == (3000, 64, 50)
    (row,) = result["rows"]
    # Logits and their gradient, 256 x 3,000 in float32, which ours never holds.
    assert row["bytes"]["dense_float32"] > 2 * 4 * 256 * 3000
    assert row["bytes"]["quantised"] < row["bytes"]["dense_float32"]
    assert row["times_less_than_float32"] == (
        row["bytes"]["dense_float32"] / row["bytes"]["quantised"]
    )
    assert "MB" in capsys.readouterr().out


def test_without_an_output_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory"])
    with pytest.raises(SystemExit, match="2"):
        memory.main()
    assert "required: --output" in capsys.readouterr().err


def test_elsewhere_than_on_linux_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "PEAK_RESET", tmp_path / "missing")
    monkeypatch.setattr(sys, "argv", ["memory", "--output", str(tmp_path / "never.json")])
    with pytest.raises(SystemExit, match="2"):
        memory.main()
    assert "which Linux alone has" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
