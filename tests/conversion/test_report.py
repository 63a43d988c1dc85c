import json

import pytest
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from rich.console import Console

from hf_vqlogits.conversion.card import model_card, plot
from hf_vqlogits.conversion.coverage import TextCoverage
from hf_vqlogits.conversion.report import ConversionReport
from hf_vqlogits.conversion.size_tables import Candidate, LadderRung, NestedRung


@pytest.fixture
def report():
    return ConversionReport(
        source="gpt2",
        repository=None,
        output="out/gpt2-vq",
        method="signs",
        code_type="sign",
        vocab_size=50_257,
        padded_tokens=47,
        hidden_size=768,
        num_codebooks=1_003,
        codebook_size=2,
        num_fine_tokens=0,
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
        model_parameters={"before": 124_439_808, "after": 125_211_115},
        model_bytes={"before": 497_759_232, "after": 507_176_842},
        embeddings="keep",
        tied_before=True,
        embedding_before={"parameters": 38_597_376, "bytes": 154_389_504},
        embedding_after={"parameters": 38_597_376, "bytes": 154_389_504},
        seed=0,
        perplexity={"before": 30.0, "after": 31.5, "factor": 1.05},
        greedy_agreement=0.91,
        logit_seconds={"dense_float32": 5e-3, "dense_bfloat16": 4e-3, "quantised": 2.5e-4},
        calibration={"source": "WikiText-2", "tokens": 100_000},
        evaluation={"source": "held out", "tokens": 25_000, "context": 512},
        seconds={"fit": 120.0},
        notes=["a note"],
        base_model="gpt2",
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


def printed(report, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    report.print(console)
    return console.export_text()


def test_terminal_shows_before_and_after(report, rung):
    report.ladder = [rung]
    shown = printed(report, 200)
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
    assert "distillation" not in shown


def test_parameters_of_the_whole_model(report):
    rows = {name: values for name, *values in report.rows()}
    assert rows["whole model, parameters"] == ["124,439,808", "125,211,115"]
    assert report.to_dict()["model_parameters"] == {"before": 124_439_808, "after": 125_211_115}


@pytest.mark.parametrize(
    ("dense", "words"),
    [
        ((5e-3, 4e-3), "1 ms (5x / 4x faster)"),
        ((2e-4, 5e-4), "1 ms (5x / 2x slower)"),
        ((2e-3, 1e-4), "1 ms (2x faster / 10x slower)"),
        ((2.5, 1e-4), "1 ms (2,500x faster / 10x slower)"),
    ],
)
def test_a_slower_head_is_called_slower(report, dense, words):
    report.logit_seconds = {
        "dense_float32": dense[0],
        "dense_bfloat16": dense[1],
        "quantised": 1e-3,
    }
    assert words in [row[2] for row in report.rows()]


def test_a_larger_head_is_called_larger(report):
    report.head_before["bytes"] = report.head_after["bytes"] // 2
    assert "9.4 MB (2x larger)" in [row[2] for row in report.rows()]


def test_ladder_fits_80_columns(report):
    report.ladder = [
        LadderRung(0.995, 250, 0.3255, 3_100_000, 1036.04, 12.3456, 0.8, 1.5e-4),
        LadderRung(0.96, 12_007, 2.6133, 154_389_504, 31.5, 1.05, 0.91, 12.5e-3),
    ]
    lines = printed(report, 80).splitlines()
    [start] = (i for i, line in enumerate(lines) if line.startswith("sizes to choose from"))
    above, header, _, first, second = (
        [cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")]
        for line in lines[start + 2 : start + 7]
    )
    names = [f"{one} {two}".strip() for one, two in zip(above, header, strict=True)]
    assert names == [
        *("saved", "bits a token", "bits a weight", "bytes"),
        *("perplexity", "factor", "same token", "one row"),
    ]
    assert first == [
        *("99.5%", "250", "0.33", "3.1 MB"),
        *("1036.04", "x12.346", "80.0%", "0.15 ms"),
    ]
    assert second == [
        *("96.0%", "12,007", "2.61", "154.4 MB"),
        *("31.50", "x1.050", "91.0%", "12.5 ms"),
    ]


@pytest.fixture
def of_several_sizes(report):
    report.nested = [
        NestedRung(0.99, 501, 0.65, 5_000_000, 1036.04, 12.3456, 0.8, 1.5e-4, 501),
        NestedRung(0.98, 1_003, 1.31, 10_900_000, 31.5, 1.05, 0.91, 2.5e-4, 1_003),
    ]
    report.head_after["nested_bytes"] = 1_541_076
    return report


def test_sizes_inside_fit_80_columns(of_several_sizes):
    lines = printed(of_several_sizes, 80).splitlines()
    [start] = (i for i, line in enumerate(lines) if line.startswith("sizes inside"))
    above, header, _, first, second = (
        [cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")]
        for line in lines[start + 2 : start + 7]
    )
    names = [f"{one} {two}".strip() for one, two in zip(above, header, strict=True)]
    assert names == [
        *("R", "saved", "bits a token", "bytes loaded"),
        *("perplexity", "factor", "same token", "one row"),
    ]
    assert first == [
        *("501", "99.0%", "501", "5.0 MB"),
        *("1036.04", "x12.346", "80.0%", "0.15 ms"),
    ]
    assert second[:4] == ["1,003", "98.0%", "1,003", "10.9 MB"]
    call = 'AutoModelForCausalLM.from_pretrained("gpt2-vq", num_codebooks=501)'
    shown = printed(of_several_sizes, 200)
    assert f"load one of them: {call}" in shown
    assert "R = 1,003; inside it R = 501" in shown


def test_codebooks_of_sizes_inside_are_counted(of_several_sizes):
    rows = {name: values for name, *values in of_several_sizes.rows()}
    assert rows["of these, codebooks of smaller sizes"] == ["", "1.5 MB"]


def test_card_tells_how_a_size_inside_is_loaded(of_several_sizes):
    card = model_card(of_several_sizes)
    call = 'model = AutoModelForCausalLM.from_pretrained("gpt2-vq", num_codebooks=501)'
    assert f"```python\n{call}\n```" in card
    assert "| 501 | 99.0% | 501 | 5.0 MB | 1036.04 |" in card
    assert "Sizes that were compared" not in card


def test_what_was_distilled_of_several_sizes(of_several_sizes):
    done = {"steps": 9, "kl_before": 0.3, "kl_after": 0.2, "stopped": None}
    of_several_sizes.fit |= {"distillation": done, "end to end": done | {"steps": 8}}
    assert of_several_sizes.distillation.startswith("of each size; of the whole 9 steps; diverg")
    assert of_several_sizes.end_to_end.startswith("of the largest size alone: 8 steps; divergence")


@pytest.fixture
def searched(report):
    report.max_perplexity_increase = 0.02
    report.candidates = [
        Candidate(696, 765.6, 0.9861, 1.0312, None, 0.9412, None, False),
        Candidate(720, 792.0, 0.9857, 1.0256, 1.0211, 0.9423, False, False),
        Candidate(736, 809.6, 0.9853, 1.0241, 1.0196, 0.9434, True, True),
        Candidate(12_800, 14_080.0, 0.7456, 1.0101, 1.00909, 0.9876, True, False),
    ]
    return report


CELLS = [
    ["696", "766", "98.6%", "x1.0312", "", "94.1%", ""],
    ["720", "792", "98.6%", "x1.0256", "x1.0211", "94.2%", "no"],
    ["736", "810", "98.5%", "x1.0241", "x1.0196", "94.3%", "chosen"],
    ["12,800", "14,080", "74.6%", "x1.0101", "x1.0091", "98.8%", "yes"],
]


def test_candidates_fit_80_columns(searched):
    lines = printed(searched, 80).splitlines()
    [start] = (i for i, line in enumerate(lines) if line.startswith("sizes tried for a perplexity"))
    assert lines[start].strip() == "sizes tried for a perplexity of at most +2%"
    rows = [line.strip("│").split("│") for line in lines[start:] if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == CELLS


def test_candidates_in_card_and_json(searched):
    card = model_card(searched)
    assert "Sizes tried for a perplexity of at most +2%:" in card
    for cells in CELLS:
        assert "| " + " | ".join(cells) + " |" in card
    values = json.loads(searched.to_json())
    assert values["max_perplexity_increase"] == 0.02
    assert values["candidates"][1] == {
        "num_codebooks": 720,
        "bits_per_token": 792.0,
        "param_reduction": 0.9857,
        "fit_factor": 1.0256,
        "factor": 1.0211,
        "greedy_agreement": 0.9423,
        "passed": False,
        "chosen": False,
    }


def test_coverage_is_told_everywhere(report):
    assert "coverage" not in printed(report, 200)
    report.coverage = {
        "evaluation": TextCoverage(25_000, 0.0812, 1.07),
        "own_text": TextCoverage(2_016, 0.293, 3.672),
    }
    report.likely_vocabulary = 0.084
    told = (
        "coverage of the evaluation text: 8.1% of its tokens never occur in the calibration text, "
        "mean square of its hidden states x1.07",
        "coverage of what the model writes by itself: 29.3% of its tokens never",
        "tokens that the calibration text makes likely: 8.4%",
    )
    for shown in (printed(report, 200), model_card(report)):
        for part in told:
            assert part in shown.replace("\n", " ")
    values = json.loads(report.to_json())
    assert values["coverage"]["own_text"] == {"tokens": 2_016, "unseen": 0.293, "hidden": 3.672}
    assert values["likely_vocabulary"] == 0.084


@pytest.mark.parametrize(
    ("rereadings", "told"),
    [
        (0, "WikiText-2, 100,000 tokens\n"),
        (2, "100,000 tokens, read again 2x with tokens redrawn\n"),
    ],
)
def test_card_tells_how_often_the_text_was_read(report, rereadings, told):
    report.calibration["rereadings"] = rereadings
    assert told in model_card(report)


def test_card_is_markdown_with_front_matter(report, rung):
    report.ladder = [rung]
    card = model_card(report)
    assert "num_codebooks=" not in card
    assert ModelCard(card).data.to_dict() == {
        "base_model": "gpt2",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["vq-logits", "vector-quantisation"],
    }
    assert "gpt2 with its dense output layer" in card
    assert 'from_pretrained("gpt2-vq")' in card
    assert "| perplexity, held-out text | 30.00 | 31.50 (x1.050) |" in card
    assert "| whole model, parameters | 124,439,808 | 125,211,115 |" in card
    assert "| 99.0% | 501 |" in card


def test_card_names_no_base_model_that_is_not_on_the_hub(report):
    report.source, report.base_model = "MyGPT", None
    card = model_card(report)
    assert ModelCard(card).data.base_model is None
    assert "MyGPT with its dense output layer" in card


def test_a_base_model_that_yaml_would_read_as_a_number(report):
    report.base_model = "0123"
    assert ModelCard(model_card(report)).data.base_model == "0123"


@pytest.mark.parametrize("output", ["/home/someone/out", "someone/../out/", "~/out"])
def test_only_the_terminal_shows_the_folder_written(report, output):
    report.output = output
    assert report.to_dict()["output"] == "out"
    assert 'from_pretrained("out")' in model_card(report)
    assert f"-> {output}" in printed(report, 200)


def test_card_tells_of_training(report):
    card = model_card(report)
    assert "without training." in card
    assert "distillation" not in card
    done = {"steps": 1_200, "kl_before": 0.12345, "kl_after": 0.05, "stopped": None}
    report.fit["distillation"] = done
    told = "1,200 steps; divergence from the dense layer 0.123 -> 0.05 nats a token"
    card = model_card(report)
    assert "without training" not in card
    assert f"the output layer alone trained by distillation ({told}" in card
    assert f"- distillation: {told}" in card
    assert told in printed(report, 200)


def test_reports_without_text_or_times(report, tmp_path):
    report.perplexity = report.greedy_agreement = report.calibration = report.evaluation = None
    report.logit_seconds = {}
    report.perplexity_bound = 6.5
    assert "6.50" in dict((row[0], row[2]) for row in report.rows()).values()
    model_card(report)
    plot(report, tmp_path / "plot.png")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], Figure.savefig

    def record(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


def test_plot_draws_bars_before_and_after(report, drawn, tmp_path):
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    [figure] = drawn
    assert figure.get_suptitle() == "gpt2, 1,003 bits a token"
    panels = {axis.get_title(): [bar.get_height() for bar in axis.patches] for axis in figure.axes}
    assert panels == {
        "output layer, MB": pytest.approx([154.389504, 9.41761]),
        "logits of one row, ms": pytest.approx([5, 0.25]),
        "perplexity": pytest.approx([30, 31.5]),
    }
    for axis in figure.axes:
        assert [label.get_text() for label in axis.get_xticklabels()] == ["dense", "VQ-Logits"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["154", "9.42"]


@pytest.fixture
def of_both_sides(report):
    report.embeddings = "tied"
    report.embedding_after = {"parameters": 768, "bytes": 3_072}
    report.model_parameters["after"] = 86_614_571
    report.model_bytes["after"] = 352_787_466
    report.perplexity["head_alone"] = 31.2
    return report


def test_both_sides_are_told_apart(of_both_sides):
    rows = {name: values for name, *values in of_both_sides.rows()}
    assert rows["input embedding, float parameters"] == ["38,597,376", "768 of its own"]
    assert rows["input embedding, bytes (codes counted)"] == ["154.4 MB", "3.1 kB of its own"]
    assert rows["whole model, bytes"] == ["497.8 MB", "352.8 MB"]
    assert rows["perplexity, held-out text"] == ["30.00", "31.50 (x1.050)"]
    assert rows["with the output layer alone replaced"] == ["", "31.20 (x1.040)"]
    shown = printed(of_both_sides, 200)
    assert "input embedding: tied: codes and codewords of the output layer" in shown
    of_both_sides.embeddings = "vq"
    rows = {name: values for name, *values in of_both_sides.rows()}
    assert rows["input embedding, bytes (codes counted)"] == ["154.4 MB", "3.1 kB"]


def test_plot_of_both_sides_shows_the_whole_model(of_both_sides, drawn, tmp_path):
    plot(of_both_sides, tmp_path / "plot.png")
    panels = {axis.get_title(): [b.get_height() for b in axis.patches] for axis in drawn[0].axes}
    assert panels["whole model, MB"] == pytest.approx([497.759232, 352.787466])


@pytest.mark.parametrize(
    ("tied", "words"), [(True, "kept dense (it was tied"), (False, "kept dense")]
)
def test_a_dense_input_side(report, tied, words):
    report.tied_before = tied
    assert dict(report.facts())["input embedding"].startswith(words)
    assert not any("input embedding" in name for name, *_ in report.rows())


def test_plot_draws_a_point_for_every_size_inside(of_several_sizes, drawn, tmp_path):
    plot(of_several_sizes, tmp_path / "plot.png")
    points = drawn[0].axes[-1].lines[0].get_xydata().tolist()
    assert points == [[5.0, 12.3456], [10.9, 1.05]]


def test_plot_draws_a_point_for_every_rung(report, rung, drawn, tmp_path):
    small = LadderRung(0.995, 250, 0.33, 3_000_000, 60.0, 2.0, 0.6, 1e-4)
    large = LadderRung(0.96, 2_007, 2.61, 9_000_000, 31.5, 1.05, 0.91, 3e-4)
    report.ladder = [large, small, rung]
    plot(report, tmp_path / "plot.png")
    axis = drawn[0].axes[-1]
    assert len(drawn[0].axes) == 4
    assert axis.get_title() == "perplexity factor"
    assert axis.get_xlabel() == "output layer, MB"
    points = axis.lines[0].get_xydata().tolist()
    assert points == [[3.0, 2.0], [5.0, 1.2], [9.0, 1.05]]
    assert [label.get_text() for label in axis.texts] == ["99.5%", "99.0%", "96.0%"]
    assert [list(label.xy) for label in axis.texts] == points


@pytest.fixture
def of_refined_logits(report):
    report.refinement = {
        "top_k": 64,
        "deviations": 2.5,
        "bytes": 402_056,
        "perplexity": 30.3,
        "greedy_agreement": 0.99912,
        "scored": 5.25,
        "certified": 0.125,
    }
    report.logit_seconds["refined"] = 5e-4
    return report


def test_what_scoring_again_does_is_told_everywhere(of_refined_logits):
    console = Console(width=120, record=True)
    of_refined_logits.print(console)
    text, card = console.export_text(), model_card(of_refined_logits)
    for told in (
        "0.4 MB",
        "99.91%",
        "30.30 (x1.010)",
        "0.5 ms (10x / 8x faster)",
        "of the 64 best those within 2.50 deviations of the errors: 5.2 tokens",
        "at 12.5% of positions",
    ):
        assert told in text, told
        assert told in card, told


def test_a_rule_that_scores_all_candidates(of_refined_logits):
    of_refined_logits.refinement["deviations"] = None
    facts = dict(of_refined_logits.facts())
    assert facts["best logits scored again"].startswith("of the 64 best: 5.2 tokens")
    assert json.loads(of_refined_logits.to_json())["refinement"]["deviations"] is None


def test_refined_logits_without_text_or_times(of_refined_logits):
    of_refined_logits.perplexity, of_refined_logits.logit_seconds = None, {}
    names = [name for name, _, _ in of_refined_logits.rows()]
    assert names[-2:] == [
        "with the best logits scored again: bytes added",
        "same most likely token",
    ]


def test_figures_that_are_not_finite_are_null_in_json(report):
    report.fit = {"distillation": {"history": [(0, 0.5), (4, float("nan"))], "kl": float("inf")}}

    def refuse(name):
        raise AssertionError(name)

    told = json.loads(report.to_json(), parse_constant=refuse)["fit"]["distillation"]
    assert told == {"history": [[0, 0.5], [4, None]], "kl": None}
