import json

import pytest

from benchmarks import markdown, tables


def test_the_documents_are_what_the_results_say():
    texts = [document.read_text(encoding="utf8") for document in tables.DOCUMENTS]
    assert [tables.rewrite(text) for text in texts] == texts
    assert "".join(texts).count("<!-- table: ") == len(tables.TABLES)


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


def test_fitted_and_distilled_heads(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)

    def row(head, factor, seconds):
        texts = {"novels": {"dense_perplexity": 81.3, "factor": factor, "greedy_agreement": 0.912}}
        return {
            "model": "one",
            "head": head,
            "bits_per_token": 1079.4,
            "bits_per_weight": 1.87,
            "total_bytes": 8_900_000,
            "dense_bytes_bfloat16": 56_600_000,
            "factor": factor,
            "texts": texts,
            "seconds": seconds,
            "calibration_seconds": 600,
        }

    rows = [row("signs 98.0%", 1.05, 120), row("signs 98.0% distilled", 1.04, 240)]
    (tmp_path / "quality_fit.json").write_text(json.dumps({"rows": rows}))
    _, _, dense, fitted, distilled = tables.quality("one").splitlines()
    assert "56.6 MB" in dense
    assert "perplexity 81.30" in dense
    bytes_ = "1,079 | 1.87 | 8.9 MB"
    assert fitted == f"| sign codes, 98% | {bytes_} | **x1.050** | x1.050 | 91.2% | 12 |"
    # The time of a distilled head is that of its fit as well.
    assert distilled.startswith(f"| sign codes, 98%, distilled | {bytes_} | **x1.040** |")
    assert distilled.endswith("| 91.2% | 16 |")


def test_peers(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert tables.peers("one") == ""

    def row(peer, size, factor):
        text = {"greedy_agreement": 0.912}
        return {
            "model": "one",
            "peer": peer,
            "setting": "4 bit",
            "bytes": size,
            "bits_per_weight": 4.25,
            "factor": factor,
            "texts": {"novels": text},
        }

    rows = [row("GPTQ", 3_000_000, 1.00123), row("sign codes", 1_234_567, 2.3456)]
    (tmp_path / "quality.json").write_text(json.dumps({"rows": rows}))
    assert tables.peers("another") == ""
    lines = tables.peers("one").splitlines()
    assert lines[2] == "| **sign codes** | 4 bit | 1.23 | 4.25 | **x2.346** | 91.2% |"
    assert lines[3] == "| GPTQ | 4 bit | 3.00 | 4.25 | x1.0012 | 91.2% |"
