"""The whole benchmark on a tiny random model."""

import json
import sys

import pytest

from benchmarks import refined


def test_results_and_table(tiny_case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(refined, "load_case", lambda *_, **__: tiny_case)
    monkeypatch.setattr(refined, "CANDIDATES", (4, 300, 1000))
    output = tmp_path / "refined.json"
    words = ["refined", "--quick", "--only", "gpt2-novels", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--param-reduction", "0.98"])
    refined.main()

    result = json.loads(output.read_text())
    rows = {row["scored_again"]: row for row in result["rows"]}
    assert list(rows) == ["none", "T = 4", "T = 300"]  # no more than the vocabulary
    assert (result["seed"], result["quick"]) == (0, True)
    agreement = [row["texts"]["novels"]["greedy_agreement"] for row in rows.values()]
    assert agreement == sorted(agreement)
    assert agreement[0] < agreement[1]
    assert agreement[2] > 0.98
    assert rows["T = 300"]["factor"] == pytest.approx(1, abs=abs(rows["none"]["factor"] - 1))
    scored = [rows[f"T = {t}"]["texts"]["novels"]["scored"] for t in (4, 300)]
    assert 0 < scored[0] <= scored[1]
    for row in rows.values():
        assert row["milliseconds"] > 0
        assert row["faster_than_float32"] > 0
    printed = capsys.readouterr().out
    assert "T = 300" in printed
    assert "scored again" in printed


def test_a_work_folder_of_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(refined, "load_case", None)
    (tmp_path / "settings.json").write_text('{"seed": 1, "quick": true}')
    words = ["refined", "--quick", "--work", str(tmp_path), "--output", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="2"):
        refined.main()
    assert "of other settings (seed 1, not 0)" in capsys.readouterr().err
