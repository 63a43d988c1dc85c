import json

from benchmarks import markdown, target_tables
from benchmarks.target_tables import DISTILLED, FIT, TIED, TUNED, Target


def test_targets(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    wanted = (
        Target("one", 0.01, FIT, 1.2, 10),
        Target("one", 0.01, DISTILLED, 1.15, 20),
        Target("one", 0.02, FIT, 1.1),
        Target("one", 0.02, TUNED, 1.01),
        Target("one", 0.02, TIED, 1.05),
    )
    monkeypatch.setattr(target_tables, "TARGETS", wanted)

    def head(name, factor, seconds):
        row = {"model": "one", "head": name, "factor": factor, "seconds": seconds}
        return row | {"calibration_seconds": 300}

    rows = [
        head("signs 99.0%", 1.2, 600),
        head("signs 99.0% distilled", 1.16, 240),
        head("signs 98.0%", 1.0499, 60),
        head("kmeans 98.0%", 9.0, 60) | {"model": "other"},
    ]
    (tmp_path / "quality_fit.json").write_text(json.dumps({"rows": rows}))
    lines = target_tables.targets().splitlines()[2:]
    start = "| one | 99% | fit alone | x1.2, 10 minutes | "
    assert lines[0] == start + "x1.2000, 15 minutes | **missed**: time |"
    assert lines[1].endswith("| x1.1600, 19 minutes | **missed**: perplexity |")
    assert lines[2] == "| one | 98% | fit alone | x1.1 | x1.0499, 6 minutes | met |"
    assert all(line.endswith("| not measured |  |") for line in lines[3:])

    def tuned(factor, **more):
        row = {"method": "signs", "embeddings": "keep", "reduction": 0.98, **more}
        return row | {"factor": {"mean": factor}}

    rows = [
        tuned(1.0, method=None, reduction=0.0),
        tuned(1.02),
        tuned(1.011, whole=True),
        tuned(1.0, method="kmeans"),
        tuned(1.001, reduction=0.96),
        tuned(1.04, embeddings="tied"),
    ]
    (tmp_path / "finetuned.json").write_text(json.dumps({"rows": rows}))
    lines = target_tables.targets().splitlines()[2:]
    assert lines[3].endswith("| x1.01 | x1.0110 | **missed**: perplexity |")
    assert lines[4].endswith("| x1.05 | x1.0400 | met |")


def test_bounds(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert target_tables.bounds() == ""
    found = {
        "error_over_fixed_bound": 1.234,
        "fixed_bits_at_error": 80.0,
        "error_over_spread_bound": 1234.5,
        "spread_bits_at_error": 25.0,
    }
    ours = {"model": "one", "factor": 1.5, "rate_distortion": found, "setting": "1% kept"}
    ours["details"] = {"bits_per_token": 100.0}
    peer = {"model": "one", "factor": 1.5, "setting": "4 bit", "rate_distortion": None}
    rows = [ours, ours | {"setting": "1% kept, float32 codewords"}, peer]
    (tmp_path / "quality.json").write_text(json.dumps({"rows": rows}))
    (line,) = target_tables.bounds().splitlines()[2:]
    assert line == "| one | 1% kept | 100 | 1.23 | 0.80 | 1,234 | 0.25 | x1.5000 |"
