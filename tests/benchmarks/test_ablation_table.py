"""The ablation's rows as text."""

import json

from benchmarks import markdown
from benchmarks.ablation_table import COLUMNS, ablation, cells

TEXT = {"novels": {"perplexity": 100.0, "greedy_agreement": 0.5}}
DENSE = {
    "method": None,
    "distilled": "no",
    "trained": "all",
    "factor": 1.0,
    "texts": TEXT,
    "sections": ["training"],
}
SIGNS = {
    **DENSE,
    "method": "signs",
    "code_type": "sign",
    "num_codebooks": 1500,
    "codebook_size": 2,
    "bits_per_token": 1500,
    "total_bytes": 4_000_000,
    "factor": 1.00361,
}
ONE_CODEBOOK = {
    **SIGNS,
    "method": "kmeans",
    "code_type": "index",
    "num_codebooks": 1,
    "codebook_size": 500,
    "factor": 12.34,
    "perplexity_bound": {"novels": 99.96},
    "sections": ["size", "training"],
}


def test_a_row_says_what_its_condition_has():
    told = [dict(zip(COLUMNS, cells(row), strict=True)) for row in (DENSE, SIGNS, ONE_CODEBOOK)]
    assert [row["head"] for row in told] == ["dense", "signs", "kmeans"]
    assert [row["R or G x K"] for row in told] == ["", "1,500", "1 x 500"]
    assert [row["MB"] for row in told] == ["", "4.00", "4.00"]
    assert [row["factor"] for row in told] == ["x1.0000", "x1.0036", "x12.3"]
    assert [row["bound"] for row in told] == ["", "", "100.0"]
    assert told[0]["same greedy token"] == "50.0%"


def test_a_section_holds_its_own_rows_and_nothing_before_they_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert ablation("size") == ""
    rows = [DENSE, SIGNS, ONE_CODEBOOK]
    (tmp_path / "ablation.json").write_text(json.dumps({"rows": rows}))
    assert "kmeans" in ablation("size")
    assert "signs" not in ablation("size")
    assert ablation("training").count("\n") == 2 + len(rows)
    assert ablation("mapping").count("\n") == 2
