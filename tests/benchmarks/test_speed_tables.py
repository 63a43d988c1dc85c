import json

from benchmarks import markdown, speed_tables


def test_generation(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert speed_tables.generation() == ""
    row = {
        "model": "GPT-2 shape, 99%",
        "bits": 1500,
        "compiled": True,
        "tokens_per_second": {"dense": 20.04, "quantised": 30.26},
        "times_faster": 1.51,
        "bound": 1.6,
        "share_of_the_bound": 0.944,
    }
    rows = [row, {**row, "compiled": False}]
    (tmp_path / "generate_speed.json").write_text(json.dumps({"rows": rows}))
    lines = speed_tables.generation().splitlines()
    assert lines[0].count("|") == lines[2].count("|")
    assert lines[2] == (
        "| GPT-2 shape, 99% | 1,500 | compiled | 20.0 | 30.3 | **1.51x** | 1.60x | 94% |"
    )
    assert "| eager |" in lines[3]


def test_rounding(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert speed_tables.rounding() == ""

    def text(change, same):
        error = {"largest_error": 0.01234, "largest_logit": 31.26}
        return {"perplexity_change": change, "same_token": same, **error}

    texts = {"wikitext2": text(1e-5, 0.999), "novels": text(-3e-5, 0.9985)}
    row = {"model": "smollm2", "num_codebooks": 1962, "paths": {"avx512": texts, "plain": texts}}
    (tmp_path / "rounding.json").write_text(json.dumps({"rows": [row]}))
    lines = speed_tables.rounding().splitlines()
    assert len(lines) == 4
    assert lines[2] == "| smollm2 | 1,962 | `avx512` | -0.0030% | 99.85% | 0.0123 | 31.3 |"


def test_memory_that_was_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert speed_tables.memory() == speed_tables.refined() == ""
