"""The whole benchmark on a tiny random model."""

import json
import sys

import pytest

from benchmarks import whole_model


def test_results_and_table(tiny_case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(whole_model, "load_case", lambda *_, **__: tiny_case)
    rows = {"80": whole_model.Row(0.8), "tied-80": whole_model.Row(0.8, "tied")}
    monkeypatch.setattr(whole_model, "ROWS", rows)
    output = tmp_path / "body.json"
    words = ["whole_model", "--model", "gpt2-novels", "--steps", "30", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--only", "80"])
    whole_model.main()
    monkeypatch.setattr(sys, "argv", words)
    whole_model.main()
    found = {row["embeddings"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(found) == ["keep", "tied"]
    for row in found.values():
        told = row["distillation"]
        assert told["steps"] == row["steps"] == 30
        assert told["kl_after"] < told["kl_before"]
        assert (
            row["texts"]["novels"]["dense_perplexity"]
            == (row["fitted"]["texts"]["novels"]["dense_perplexity"])
        )
    assert found["tied"]["fitted"]["factor"] > found["keep"]["fitted"]["factor"]
    assert "tied" in capsys.readouterr().out
    monkeypatch.setattr(whole_model, "load_case", None)  # nothing is made again
    whole_model.main()


def test_results_of_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(whole_model, "load_case", None)
    output = tmp_path / "body.json"
    output.write_text('{"benchmark": "whole_model", "seed": 1, "runs": [], "rows": []}')
    monkeypatch.setattr(sys, "argv", ["whole_model", "--output", str(output)])
    with pytest.raises(SystemExit, match="2"):
        whole_model.main()
    assert "is of other settings" in capsys.readouterr().err
