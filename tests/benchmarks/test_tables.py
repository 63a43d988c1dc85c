import json

import pytest

from benchmarks import tables


def test_the_readme_is_what_the_results_say():
    text = tables.README.read_text(encoding="utf8")
    assert tables.rewrite(text) == text
    assert text.count("<!-- table: ") == len(tables.TABLES)


def test_tables_are_replaced_and_the_rest_stays(monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "| new |\n", "two": lambda: "| 2 |\n"})
    text = "a\n<!-- table: one -->\n| old |\n<!-- end -->\nb\n<!-- table: two -->\n<!-- end -->\nc"
    assert tables.rewrite(text) == (
        "a\n<!-- table: one -->\n| new |\n<!-- end -->\nb\n"
        "<!-- table: two -->\n| 2 |\n<!-- end -->\nc"
    )


def test_unknown_tables_are_refused():
    with pytest.raises(KeyError, match="three"):
        tables.rewrite("<!-- table: three -->\n<!-- end -->")


def test_tables_are_markdown():
    made = tables.table("a | b", [["1", "2"], ["3", "4"]])
    assert made == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n"
    assert (tables.times(1.2345), tables.times(66.454)) == ("x1.234", "x66.5")


def test_fine_tuned_models(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.finetuned() == ""

    def spread(mean):
        return {"mean": mean, "least": mean - 0.001, "most": mean + 0.002}

    def row(method, embeddings, factor, **more):
        text = {
            "factor": spread(factor),
            "perplexity": spread(20 * factor),
            "agreement_tuned_dense": spread(0.9),
            "agreement_untuned_dense": spread(0.8),
        }
        return {
            "method": method,
            "embeddings": embeddings,
            "reduction": 0.98,
            "learning_rate": 3e-4,
            "untuned": {"factor": 1.2},
            "factor": spread(factor),
            "texts": {"novels": text},
            **more,
        }

    rows = [
        row(None, "keep", 1.0),
        row("signs", "tied", 1.05),
        row("kmeans", "keep", 8.0, perplexity_bound={"novels": 30.0}),
    ]
    (tmp_path / "finetuned.json").write_text(json.dumps({"rows": rows}))
    lines = tables.finetuned().splitlines()
    assert lines[0].count("|") == lines[2].count("|") == lines[3].count("|")
    assert lines[2].startswith("| dense | 0.0003 | x1.200 | **x1.000** |")
    assert "| perplexity 20.00 | 90.0% | 80.0% |" in lines[2]
    assert lines[3].startswith("| sign codes, 98%, input tied |")
    assert "| **x1.050** | x1.049 to x1.052 | x1.050 |" in lines[3]
    assert lines[-1].endswith("can be below 30.0.")
