import json
import math
import os

import pytest
import torch

from hf_vqlogits.conversion import (
    ConversionError,
    convert_to_vq,
    distillation,
    selection,
    training,
)
from hf_vqlogits.conversion.cli import main


@pytest.fixture(scope="module")
def short_file(text, tmp_path_factory):
    """Enough for a distillation."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(text[:60_000], encoding="utf8")
    return path


@pytest.fixture(scope="module")
def chosen(tiny_folder, short_file, tmp_path_factory):
    """By the fit alone, with a ladder."""
    return convert_to_vq(
        tiny_folder,
        output=tmp_path_factory.mktemp("chosen") / "tiny-vq",
        max_perplexity_increase=0.02,
        calibration_data=short_file,
        ladder=True,
    )


def the_one(report):
    [one] = [candidate for candidate in report.candidates if candidate.chosen]
    return one


def test_the_smallest_within_the_limit_is_written(chosen):
    one = the_one(chosen)
    assert chosen.perplexity["factor"] <= 1.02
    assert chosen.perplexity["factor"] == pytest.approx(one.factor, rel=1e-6)
    assert (chosen.num_codebooks, chosen.bits_per_token) == (one.num_codebooks, one.bits_per_token)
    assert chosen.param_reduction == one.param_reduction
    assert one.passed
    smaller = [c for c in chosen.candidates if c.num_codebooks < one.num_codebooks and c.factor]
    assert smaller
    assert all(c.factor > 1.02 and not c.passed for c in smaller)
    assert one.num_codebooks - max(c.num_codebooks for c in smaller) <= 8
    assert one.num_codebooks % 8 == 0


def test_report_and_card_hold_what_was_tried(chosen):
    stored = json.loads(open(f"{chosen.output}/vq_report.json").read())
    assert stored["max_perplexity_increase"] == 0.02
    assert [c["num_codebooks"] for c in stored["candidates"]] == sorted(
        c.num_codebooks for c in chosen.candidates
    )
    card = open(f"{chosen.output}/README.md").read()
    one = the_one(chosen)
    assert f"x{one.factor:.4f} | {one.greedy_agreement:.1%} | chosen |" in card
    assert one.greedy_agreement == pytest.approx(chosen.greedy_agreement, abs=1e-6)
    assert any("the evaluation text chose the size" in note for note in chosen.notes)


def test_a_ladder_beside_it(chosen):
    """Its rungs are fitted first, and so are among the candidates."""
    tried = {c.bits_per_token: c.fit_factor for c in chosen.candidates}
    assert len(chosen.ladder) == 4
    for rung in chosen.ladder:
        assert tried[rung.bits_per_token] == pytest.approx(rung.perplexity_factor, rel=1e-6)


def test_distilled_candidates(tiny_folder, short_file):
    report = convert_to_vq(
        tiny_folder,
        max_perplexity_increase=0.05,
        calibration_data=short_file,
        distill_steps=20,
        dtype="bfloat16",
    )
    one = the_one(report)
    distilled = [c for c in report.candidates if c.factor is not None]
    assert 1 <= len(distilled) <= 4
    assert report.perplexity["factor"] == pytest.approx(one.factor, rel=1e-6)
    assert [c.num_codebooks for c in distilled].count(one.num_codebooks) == 1
    assert all(c.passed == (c.factor <= 1.05) for c in distilled)
    assert all(c.passed is None for c in report.candidates if c.factor is None)
    assert one.num_codebooks == min(c.num_codebooks for c in distilled if c.passed)
    assert report.fit["distillation"]["steps"] == 20


def test_the_distillation_told_of_is_that_of_the_result(tiny_folder, short_file, monkeypatch):
    """A later candidate that failed must not leave its figures behind."""
    made = []
    distill = selection.Quantiser.distill

    def record(self, head, *arguments, **options):
        distill(self, head, *arguments, **options)
        made.append((head.num_codebooks, self.details["distillation"]))

    monkeypatch.setattr(selection.Quantiser, "distill", record)
    report = convert_to_vq(
        tiny_folder, max_perplexity_increase=0.02, calibration_data=short_file, distill_steps=12
    )
    assert len(made) > 1
    assert report.fit["distillation"] == dict(made)[report.num_codebooks]


def test_an_interrupted_search_goes_on(tiny_folder, short_file, tmp_path, monkeypatch):
    options = {"max_perplexity_increase": 0.02, "calibration_data": short_file, "distill_steps": 12}
    whole = convert_to_vq(tiny_folder, **options)
    options["distill_state"] = tmp_path / "state"
    save, judge = training.save_state, distillation.held_out_kl
    begun, judged = [], []

    def interrupt(file, *arguments):
        save(file, *arguments)
        begun.append(file)
        if len(set(begun)) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_state", interrupt)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        convert_to_vq(tiny_folder, **options)
    assert set(tmp_path.iterdir()) == set(begun)
    finished = int(begun[0].suffix[1:])
    assert begun[0].name == f"state.{finished}"

    def watch(head, *arguments):
        judged.append(head.num_codebooks)
        return judge(head, *arguments)

    monkeypatch.setattr(training, "save_state", save)
    monkeypatch.setattr(distillation, "held_out_kl", watch)
    (tmp_path / "state.8000").write_bytes(b"years of work")  # of no size that is tried
    again = convert_to_vq(tiny_folder, **options)
    assert judged
    assert finished not in judged  # what was finished is not made again
    assert [file.name for file in tmp_path.iterdir()] == ["state.8000"]
    for name, tensor in whole.model.lm_head.state_dict().items():
        assert torch.equal(again.model.lm_head.state_dict()[name], tensor)
    assert again.candidates == whole.candidates


def test_a_file_that_is_no_state_is_told_before_the_model_is_read(
    tiny_folder, short_file, tmp_path, monkeypatch
):
    (tmp_path / "state.24").write_bytes(b"years of work")
    monkeypatch.setattr(selection.Quantiser, "calibrate", None)
    with pytest.raises(ConversionError, match="state.24' holds no state of a distillation"):
        convert_to_vq(
            tiny_folder,
            max_perplexity_increase=0.02,
            calibration_data=short_file,
            distill_state=tmp_path / "state",
        )
    assert (tmp_path / "state.24").read_bytes() == b"years of work"


def test_the_same_seed_gives_the_same_bytes(tiny_folder, short_file):
    options = {"max_perplexity_increase": 0.03, "calibration_data": short_file, "distill_steps": 12}
    first, again = (convert_to_vq(tiny_folder, **options) for _ in range(2))
    for name, tensor in first.model.lm_head.state_dict().items():
        assert torch.equal(again.model.lm_head.state_dict()[name], tensor)


def test_no_size_within_the_limit_writes_nothing(
    tiny_folder, short_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        selection,
        "choose_bits",
        lambda *a, fit, **k: selection.Choice(None, {8: fit(8), 16: fit(16)}, {16: math.log(1.5)}),
    )
    options = ("--max-perplexity-increase", "0.01", "--output", tmp_path / "out")
    base = ("--model", tiny_folder, "--calibration-data", short_file)
    assert main([str(word) for word in (*base, *options)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "`max_perplexity_increase` 0.01 was not reached: of sizes up to 128 bits" in line
    assert "where 1.01 is allowed. Allow more, or give more calibration text" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8, "num_codebooks": 3}, "and `bits` 8 and `num_codebooks` 3 as well"),
        ({"embeddings": "tied"}, "choose with 'keep'"),
        ({"method": "kmeans"}, "does not apply to 'kmeans'"),
    ],
)
def test_what_contradicts_is_refused_before_the_model_is_loaded(options, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert_to_vq(tmp_path / "missing", max_perplexity_increase=0.02, **options)
