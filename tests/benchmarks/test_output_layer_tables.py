import json

from benchmarks import markdown, output_layer_tables


def test_gru_svm(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert output_layer_tables.gru_svm() == output_layer_tables.gru_svm_claims() == ""

    def spread(mean):
        return {"mean": mean, "least": mean - 0.01, "most": mean + 0.01}

    scores = ("accuracy", "precision", "recall", "f1", "auc")
    times = {"training_seconds": spread(100.0), "prediction_seconds": spread(2.0)}
    row = {
        **{score: spread(0.8) for score in scores},
        **times,
        "confusion": [[90.0, 10.0], [1234.4, 66.0]],
    }
    claims = [
        {
            "claim": "more accurate",
            "setting": "tuned",
            "paper": 0.134,
            "unit": "difference of accuracies",
            "measured": spread(-0.005),
            "verdict": "not decided",
        },
        {
            "claim": "faster",
            "setting": "1 record",
            "paper": 1.22,
            "unit": "times as fast",
            "measured": spread(1.05),
            "verdict": "holds",
        },
    ]
    rows = [
        {"name": "GRU-SVM", "network": True, "rate": 1e-5, "rate_at_edge": False, **row},
        {"name": "random forest", "network": False, **row},
    ]
    (tmp_path / "gru_svm.json").write_text(json.dumps({"rows": rows, "claims": claims}))
    lines = output_layer_tables.gru_svm().splitlines()
    assert lines[2] == (
        "| GRU-SVM | 1e-05 | **80.00%** | 79.00% to 81.00% | 0.800 | 0.800 | 0.800 | 0.800 | "
        "90 / 10 | 1,234 / 66 | 100.0 s | 2.00 s |"
    )
    assert lines[3].startswith("| random forest |  | **80.00%**")
    lines = output_layer_tables.gru_svm_claims().splitlines()
    assert lines[2] == (
        "| more accurate, tuned | +13.40 points | -0.50 points | -1.50 points to +0.50 points | "
        "**not decided** |"
    )
    assert lines[3] == "| faster, 1 record | x1.220 | x1.050 | x1.040 to x1.060 | **holds** |"


def test_margins(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert output_layer_tables.margins() == ""

    def run(right, perplexity, scaled):
        text = {"right": right, "perplexity": perplexity, "perplexity_scaled": scaled}
        return {"learning_rate": 1e-3, "head_factor": 0.1, "texts": {"novels": text}}

    runs = [run(0.25, 90.0, 88.0), run(0.27, 92.0, 90.0)]
    chosen = {
        "chosen_by": ["right tokens", "perplexity"],
        "rate_at_edge": True,
        "untrained": run(0.24, 95.0, 94.0),
    }
    (tmp_path / "margins.json").write_text(
        json.dumps({"rows": [{"output_loss": "cross_entropy", "runs": runs, **chosen}]})
    )
    lines = output_layer_tables.margins().splitlines()
    assert lines[0].count("|") == lines[2].count("|")
    assert lines[2] == (
        "| cross_entropy | 0.001 (first or last of those tried) | x0.1 | right tokens, perplexity "
        "| 24.00% | **26.00%** | 25.00% to 27.00% | 95.00 | 91.00 | 94.00 | 89.00 |"
    )


def test_mixtures(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert output_layer_tables.mixtures() == ""

    def row(num_mixtures, runs, loss):
        seconds = {"logits": 3e-3, "logits_of_one_softmax": 2e-3}
        return {
            "num_mixtures": num_mixtures,
            "gate_activation": "linear",
            "num_codebooks": 490,
            "float_parameters": 127_000,
            "untrained": {"novels": 70.0},
            "untrained_differences": {"factors": 0.0071},
            "runs": runs,
            "rate_at_edge": False,
            "factor_at_edge": num_mixtures > 1,
            "seconds": {**seconds, "loss": loss, "loss_of_one_softmax": 0.1},
        }

    def run(perplexity, **more):
        return {
            "learning_rate": 3e-4,
            "layer_factor": 3.0,
            "mixture_factor": 10.0,
            "perplexity": {"novels": perplexity},
            **more,
        }

    shares = {"shares": {"largest": 0.75}, "differences": {"factors": 0.1234}}
    rows = [row(1, [run(69.0)], 0.1), row(2, [run(66.0, **shares), run(68.0, **shares)], 0.2)]
    (tmp_path / "mixtures.json").write_text(json.dumps({"rows": rows}))
    lines = output_layer_tables.mixtures().splitlines()
    assert lines[0].count("|") == lines[2].count("|") == lines[3].count("|")
    assert lines[2].startswith("| 1 |  | 490 | 127,000 | 0.0003 | x3 |  | 70.000 | **69.000** |")
    assert lines[3].endswith(
        "| 0.0003 | x3 | x10 (first or last of those tried) | 70.000 | **67.000** | "
        "66.000 to 68.000 | 0.75 | 0.007, 0.123 | x1.500 | x2.000 |"
    )


def test_gate_rates(monkeypatch, tmp_path):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)

    def row(setting, expected, value):
        slopes = {
            name: {"value": value, "low": value - 0.1, "high": value + 0.1}
            for name in ("median", "median_large_n")
        }
        return {
            "setting": setting,
            "quantity": "temperature",
            "expected_slope": expected,
            "slopes": slopes,
        }

    rows = [row("plain-exact", None, -0.1), row("gelu-exact", -0.5, -0.52), row("gelu-over", 0, 0)]
    (tmp_path / "gate_rates.json").write_text(json.dumps({"rows": rows}))
    lines = output_layer_tables.gate_rates(over=False).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| plain | temperature | none | -0.10 (-0.20, 0.00) |")
    assert lines[3].startswith("| GELU | temperature | -0.5 | -0.52 (-0.62, -0.42) |")
    assert len(output_layer_tables.gate_rates(over=True).splitlines()) == 3
