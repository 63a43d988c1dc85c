"""The whole benchmark on a tiny random model."""

import json
import sys

import pytest

from benchmarks import refined, warm_cold


def test_results_and_table(tiny_case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(refined, "load_case", lambda *_, **__: tiny_case)
    monkeypatch.setattr(warm_cold, "OTHER_BYTES", 4096)
    monkeypatch.setattr(refined, "RULES", ((4, 0.999), (300, 0.999), (300, 1.0), (1000, 0.999)))
    output = tmp_path / "refined.json"
    words = ["refined", "--quick", "--only", "gpt2-novels", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--param-reduction", "0.98", "0.96"])
    refined.main()

    result = json.loads(output.read_text())
    assert [row["reduction"] for row in result["rows"]] == [0.98] * 4 + [0.96] * 4
    away = {row["reduction"]: abs(row["factor"] - 1) for row in result["rows"][::4]}
    assert away[0.98] > away[0.96]
    rows = {row["scored_again"]: row for row in result["rows"][:4]}
    names = ["T = 4, 99.9%", "T = 300, 99.9%", "T = 300, 100.0%"]
    assert list(rows) == ["none", *names]  # no more than the vocabulary
    assert [row.get("top_k") for row in rows.values()] == [None, 4, 300, 300]
    assert (result["seed"], result["quick"]) == (0, True)
    agreement = [row["texts"]["novels"]["greedy_agreement"] for row in rows.values()]
    assert agreement == sorted(agreement)
    assert agreement[0] < agreement[1]
    assert agreement[2] > 0.98
    assert rows[names[-1]]["factor"] == pytest.approx(1, abs=abs(rows["none"]["factor"] - 1))
    scored = [rows[name]["texts"]["novels"]["scored"] for name in names]
    assert 0 < scored[0] <= scored[1] <= scored[2]
    for row in rows.values():
        for figures in (row["milliseconds"], row["faster_than_float32"]):
            assert list(figures) == ["warm", "cold"]
            assert min(figures.values()) > 0
    printed = capsys.readouterr().out
    assert "T = 300, 100.0%" in printed
    assert "scored again" in printed


def test_a_work_folder_of_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(refined, "load_case", None)
    (tmp_path / "settings.json").write_text('{"seed": 1, "quick": true}')
    words = ["refined", "--quick", "--work", str(tmp_path), "--output", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="2"):
        refined.main()
    assert "of other settings (seed 1, not 0)" in capsys.readouterr().err
