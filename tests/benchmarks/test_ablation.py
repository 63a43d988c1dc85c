"""The whole ablation on a tiny random model."""

import json
import sys

import pytest

from benchmarks import ablation
from benchmarks.ablation import Condition, in_order, sections


def test_every_condition_is_measured_once_after_its_dense_model():
    named = sections((0.99, 0.9), 0.9)
    ordered = in_order(one for some in named.values() for one in some)
    assert len(set(ordered)) == len(ordered)
    assert set(ordered) == {one for some in named.values() for one in some}
    assert [one.trained for one in ordered[:3]] == ["none", "head", "all"]
    assert all(one.method is None for one in ordered[:3])
    assert Condition("kmeans", 0.9, trained="all") in named["size"]
    assert Condition("kmeans", 0.9, trained="all") in named["initialisation"]


@pytest.mark.slow
def test_results_plot_and_table(tiny_case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "load_case", lambda *_, **__: tiny_case)
    monkeypatch.setattr(ablation, "REDUCTIONS", (0.95, 0.9))
    monkeypatch.setattr(ablation, "REDUCTION", 0.9)
    output = tmp_path / "new" / "ablation.json"
    words = ["--steps", "8", "--tokens-per-step", "64", "--context", "16", "--distill-steps", "5"]
    words += ["--learning-rate", "1e-2", "--evaluation-tokens", "160", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["ablation", *words])
    ablation.main()

    result = json.loads(output.read_text())
    keys = ("method", "reduction", "distilled", "trained")
    rows = {tuple(row[key] for key in keys): row for row in result["rows"]}
    wanted = {one for some in sections((0.95, 0.9), 0.9).values() for one in some}
    assert len(rows) == len(result["rows"]) == len(wanted)
    untrained = rows[None, 0.0, "no", "none"]["texts"]["novels"]
    trained = rows[None, 0.0, "no", "all"]["texts"]["novels"]
    assert trained["perplexity"] < untrained["perplexity"]
    for (method, _, _, training), row in rows.items():
        dense = rows[None, 0.0, "no", training]["texts"]["novels"]["perplexity"]
        text = row["texts"]["novels"]
        assert text["dense_perplexity"] == dense
        assert row["factor"] == pytest.approx(text["perplexity"] / dense)
        one_codebook = method in ("kmeans", "random", "contiguous", "frequency")
        assert ("perplexity_bound" in row) == one_codebook
        if one_codebook:
            assert text["perplexity"] >= row["perplexity_bound"]["novels"] * 0.999
    assert rows["kmeans", 0.9, "no", "all"]["sections"] == ["size", "initialisation", "training"]
    # From the same fit: codes move only where they may.
    fixed, learnt = (rows["signs", 0.9, how, "none"] for how in ("codebook", "codes"))
    assert fixed["factor"] != learnt["factor"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for word in ("size", "initialisation", "mapping", "training", "contiguous"):
        assert word in printed
