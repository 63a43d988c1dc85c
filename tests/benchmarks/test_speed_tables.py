import json

from benchmarks import markdown, speed_tables


def test_speed(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    times = {"quantised": 0.234, "dense_float32": 10.53, "dense_bfloat16": 5.2}
    faster = {"times_faster_than_float32": 45.0, "times_faster_than_bfloat16": 22.2}
    row = {
        "vocab_size": 50_257,
        "hidden_size": 768,
        "rows": 1,
        "num_codebooks": 500,
        "codebook_size": None,
        "limit_milliseconds": {"bytes": 0.1, "lookups": 0.05},
        "warm": {"milliseconds": {**times, "int8": 2.0}, **faster},
        "cold": {"milliseconds": {**times, "int8": 3.0}, **faster},
    }
    index = {
        **row,
        "num_codebooks": 62,
        "codebook_size": 256,
        "limit_milliseconds": {"bytes": 0.1, "lookups": 0},
        "warm": {"milliseconds": times, **faster},
    }
    loss = {"milliseconds": {"quantised": 500.0, "dense_float32": 3250.0}}
    (tmp_path / "speed.json").write_text(json.dumps({"rows": [row, index], "loss": [loss]}))
    lines = speed_tables.speed().splitlines()
    assert lines[2] == (
        "| 50,257 x 768 | 1 | R = 500 | 0.23 ms | 45.0x / 22.2x | 0.23 ms | 45.0x / 22.2x "
        "| 0.05 ms | 0.10 ms |"
    )
    assert speed_tables.speed("speed_amx") == ""
    assert "| G = 62, K = 256 |" in lines[3]
    assert lines[3].endswith("|  | 0.10 ms |")
    lines = speed_tables.speed_peers().splitlines()
    assert lines[0] == "|  | N = 1 |"
    assert lines[2] == "| VQ-Logits | 0.23 ms / 0.23 ms |"
    assert lines[3] == "| dense float32 | 11 ms / 11 ms |"
    assert lines[5] == "| int8 | 2.00 ms / 3.00 ms |"
    lines = speed_tables.loss().splitlines()
    assert lines[3] == "| dense float32 | 3,250 ms | 6.5 |"


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
