import json

from benchmarks import markdown
from benchmarks.finetuned_tables import finetuned, learning_curve


def test_fine_tuned_models(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert finetuned() == ""

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
            "whole": False,
            "reduction": 0.98,
            "learning_rate": 3e-4,
            "untuned": {"factor": 1.2, "texts": {"novels": {"agreement_untuned_dense": 0.7}}},
            "factor": spread(factor),
            "texts": {"novels": text},
            **more,
        }

    rows = [
        row(None, "keep", 1.0),
        row("signs", "tied", 1.05),
        row("signs", "keep", 1.03, whole=True),
        row("kmeans", "keep", 8.0, perplexity_bound={"novels": 30.0}),
    ]
    (tmp_path / "finetuned.json").write_text(json.dumps({"rows": rows}))
    lines = finetuned().splitlines()
    assert lines[0].count("|") == lines[2].count("|") == lines[3].count("|")
    assert lines[2].startswith("| dense | x1.200 | 70.0% | 0.0003 | **x1.000** |")
    assert "| perplexity 20.00 | 90.0% | 80.0% |" in lines[2]
    assert lines[3].startswith("| sign codes, 98%, input tied |")
    assert "| **x1.050** | x1.049 to x1.052 | x1.050 |" in lines[3]
    assert lines[4].startswith("| sign codes, 98%, whole model distilled |")
    assert lines[-1].endswith("can be below 30.0.")


def test_the_learning_curve_has_a_row_for_every_number_of_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert learning_curve() == ""

    def row(name, factor, rate):
        figures = {"perplexity": 20 * factor, "factor": factor, "agreement_tuned_dense": 0.9}
        text = {key: {"mean": value} for key, value in figures.items()}
        return {
            "name": name,
            "learning_rate": rate,
            "factor": {"mean": factor},
            "texts": {"novels": text},
            "seeds": [{"seed": 0}],
        }

    for name, steps, factor in (("finetuned_400", 400, 1.09), ("finetuned", 100, 1.13)):
        rows = [row("dense", 1.0, 3e-4), row("whole-99", 1.1, 3e-4), row("signs-99", factor, 1e-3)]
        run = {"steps": steps, "tokens_per_step": 1024, "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    header, _, *lines = learning_curve().splitlines()
    assert lines == [
        "| 100 | 102,400 | 0.0003 / 0.001 | 20.00 | **x1.130** | x1.130 | 90.0% | 1 |",
        "| 400 | 409,600 | 0.0003 / 0.001 | 20.00 | **x1.090** | x1.090 | 90.0% | 1 |",
    ]
    assert all(line.count("|") == header.count("|") for line in lines)
