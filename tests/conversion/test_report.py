import json

import pytest
from rich.console import Console

from hf_vqlogits.conversion.card import model_card, plot
from hf_vqlogits.conversion.report import ConversionReport, LadderRung, megabytes


@pytest.fixture
def report():
    return ConversionReport(
        source="gpt2",
        output="out/gpt2-vq",
        method="signs",
        code_type="sign",
        vocab_size=50_257,
        padded_tokens=47,
        hidden_size=768,
        num_codebooks=1_003,
        codebook_size=2,
        bits_per_token=1_003,
        bits_per_weight=1.306,
        param_reduction=0.98,
        head_before={"parameters": 38_597_376, "bytes": 154_389_504},
        head_after={
            "parameters": 771_307,
            "bytes": 9_417_610,
            "codes_bytes": 6_332_382,
            "codebook_bytes": 3_085_228,
        },
        model_bytes={"before": 497_759_232, "after": 507_176_842},
        embeddings="kept dense",
        tied_before=True,
        seed=0,
        perplexity={"before": 30.0, "after": 31.5, "factor": 1.05},
        greedy_agreement=0.91,
        logit_seconds={"dense_float32": 5e-3, "dense_bfloat16": 4e-3, "quantised": 2.5e-4},
        calibration={"source": "WikiText-2", "tokens": 100_000},
        evaluation={"source": "held out", "tokens": 25_000, "context": 512},
        seconds={"fit": 120.0},
        notes=["a note"],
        model=object(),
    )


@pytest.fixture
def rung():
    return LadderRung(0.99, 501, 0.65, 5_000_000, 36.0, 1.2, 0.8, 1.5e-4)


def test_json_holds_everything_but_the_model(report, rung):
    report.ladder = [rung]
    values = json.loads(report.to_json())
    assert "model" not in values
    assert values["ladder"][0]["bits_per_token"] == 501
    assert values["head_after"]["codes_bytes"] == 6_332_382
    assert report.model is not None


def test_terminal_shows_before_and_after(report, rung):
    report.ladder = [rung]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    report.print(console)
    shown = console.export_text()
    for part in (
        "-98.00%",
        "16.4x smaller",
        "31.50 (x1.050)",
        "91.0%",
        "20x / 16x faster",
        "47 rows above",
        "x1.200",
        "a note",
    ):
        assert part in shown, part


def test_card_is_markdown_with_front_matter(report, rung):
    report.ladder = [rung]
    card = model_card(report)
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: gpt2" in card
    assert 'from_pretrained("gpt2-vq")' in card
    assert "| perplexity, held-out text | 30.00 | 31.50 (x1.050) |" in card
    assert "| 99.0% | 501 |" in card


def test_reports_without_text_or_times(report, tmp_path):
    report.perplexity = report.greedy_agreement = report.calibration = report.evaluation = None
    report.logit_seconds = {}
    report.perplexity_bound = 6.5
    assert "6.50" in dict((row[0], row[2]) for row in report.rows()).values()
    model_card(report)
    plot(report, tmp_path / "plot.png")


@pytest.mark.parametrize("ladder", [False, True])
def test_plot_is_a_picture(report, rung, ladder, tmp_path):
    report.ladder = [rung, rung] if ladder else []
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_units():
    assert megabytes(154_389_504) == "154.4 MB"
    assert megabytes(1_500) == "1.5 kB"
