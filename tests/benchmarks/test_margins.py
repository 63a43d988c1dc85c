"""The whole benchmark on a tiny random model."""

import copy
import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import margins
from benchmarks.training import Schedule
from benchmarks.trainings import hold_out
from benchmarks.work_folder import WorkFolder
from hf_vqlogits.conversion.calibration import CalibrationStatistics
from hf_vqlogits.gru_svm.squared_hinge import squared_hinge


def test_both_losses_learn_and_are_judged(tiny_case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(margins, "load_case", lambda *_, **__: tiny_case)
    monkeypatch.setattr(margins, "other_domain", lambda case, *_, **__: case)
    monkeypatch.setattr(margins, "RATES", (1e-2, 3e-2))
    monkeypatch.setattr(margins, "SEEDS", (0, 1))
    output = tmp_path / "margins.json"
    words = ["margins", "--steps", "60", "--param-reduction", "0.9", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--work", str(tmp_path / "work")])
    margins.main()
    result = json.loads(output.read_text())
    rows = {row["output_loss"]: row for row in result["rows"]}
    assert list(rows) == ["cross_entropy", "squared_hinge"]
    for loss in rows:
        chosen = [
            name
            for row in result["rows"]
            if row["output_loss"] == loss
            for name in row["chosen_by"]
        ]
        assert sorted(chosen) == ["perplexity", "right tokens"]
    for row in result["rows"]:
        assert len(row["runs"]) == 2
        assert row["untrained"]["texts"]["novels"]["right"] < 0.2
        assert {made["learning_rate"] for made in row["tried"]} >= {1e-2, 3e-2}
        assert {made["head_factor"] for made in row["tried"]} == {1.0, 0.1}
        for name in row["chosen_by"]:
            of = margins.CRITERIA[name]
            assert of(row["runs"][0]) == min(map(of, row["tried"]))
        for made in row["runs"]:
            # Each token is followed by a certain one of 40.
            assert made["texts"]["novels"]["right"] > 0.5
            assert made["texts"]["novels"]["perplexity_scaled"] < 20
    margin = rows["squared_hinge"]["runs"][0]
    assert margin["factor_on_logits"] > 1
    assert margin["texts"]["novels"]["perplexity"] > margin["texts"]["novels"]["perplexity_scaled"]
    assert "novels: right tokens 0.00% to 100.00%" in capsys.readouterr().out

    monkeypatch.setattr(margins, "fine_tune", None)  # nothing is trained again
    margins.main()
    assert json.loads(output.read_text()) == result
    words[2] = "61"
    monkeypatch.setattr(sys, "argv", [*words, "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match="2"):
        margins.main()
    assert "is of other settings" in capsys.readouterr().err


@pytest.fixture
def bench(tiny_case, tmp_path):
    context = tiny_case.calibration.shape[1] - 1
    schedule = Schedule(2, tokens_per_step=context, batch_size=1, context=context)
    work = WorkFolder(tmp_path / "work", {})
    return margins.Bench(tiny_case, schedule, 0.9, work, 0)


def test_a_codeword_that_all_share_changes_no_logits(bench):
    fitted = bench.quantiser.sign_heads(
        [replace(bench.size, num_codebooks=bench.size.num_codebooks - 1)],
        CalibrationStatistics(**bench.work.tensors("gpt2-novels-calibration", None)["statistics"]),
    )
    [plain] = fitted.values()
    hidden = torch.randn(5, plain.in_features)
    close = 2e-3 * float(plain(hidden).detach().std())  # scores are rounded, other ones otherwise
    assert bench.head.num_codebooks == plain.num_codebooks + 1
    torch.testing.assert_close(bench.head(hidden), plain(hidden), atol=close, rtol=0)
    with torch.no_grad():
        moved = copy.deepcopy(bench.head)
        moved.codebook_bias[0] += 2.0 / moved.score_scale
        torch.testing.assert_close(moved(hidden), plain(hidden) + 2, atol=close, rtol=0)


def test_both_losses_begin_with_the_same_order_and_margins_where_their_loss_is_least(bench):
    (plain, unchanged), (model, changed) = map(bench.model, margins.OUTPUT_LOSSES)
    assert unchanged == {}
    assert 0 < changed["scale"] < 1
    assert changed["shift"] < 0
    assert [m.config.output_loss for m in (plain, model)] == list(margins.OUTPUT_LOSSES)
    hidden, labels = bench.start
    assert len(hidden) == len(labels) == margins.START_TOKENS
    with torch.no_grad():
        logits, found = plain.lm_head(hidden).double(), model.lm_head(hidden).double()
        assert torch.equal(logits.argmax(-1), found.argmax(-1))

        def loss(scale, shift):
            return float(squared_hinge(scale * found + shift, labels))

        least = loss(1.0, 0.0)
        for scale, shift in ((1.05, 0.0), (0.95, 0.0), (1.0, 0.02), (1.0, -0.02)):
            assert loss(scale, shift) > least
    assert least < float(squared_hinge(torch.full_like(found, -1.0), labels))
    for one in (plain, model):
        body, source = one.model.backbone.state_dict(), bench.case.parts.backbone.state_dict()
        assert all(torch.equal(body[name], source[name]) for name in source)


def test_the_fit_does_not_know_the_rows_that_choose_rates(bench):
    train, held = hold_out(bench.case.calibration)
    assert torch.equal(bench.quantiser.corpus.calibration, train)
    assert torch.equal(bench.rows, train[:, :-1])
    assert torch.equal(bench.held, held)


def test_each_criterion_has_the_head_factor_and_rate_that_are_best_by_it():
    """Factors are compared at the rate in the middle, rates at the better factor."""

    class Told(margins.Bench):
        def __init__(self):
            pass

        def untrained(self, loss):
            return {}

        def run(self, loss, rate, factor, seed):
            right = {1.0: 0.3, 0.1: 0.2}[factor] - abs(rate - 1)
            nats = {1.0: 5.0, 0.1: 4.0}[factor] + abs(rate - 2)
            made = {"right_on_rows_kept_out": right, "nats_on_rows_kept_out": nats}
            return made | {"learning_rate": rate, "head_factor": factor, "seed": seed}

    rows = Told().measure("squared_hinge", (4.0, 1.0, 2.0, 0.5), (7, 8))
    chosen = {
        tuple(row["chosen_by"]): [
            (made["learning_rate"], made["head_factor"], made["seed"]) for made in row["runs"]
        ]
        for row in rows
    }
    assert chosen == {
        ("right tokens",): [(1.0, 1.0, 7), (1.0, 1.0, 8)],
        ("perplexity",): [(2.0, 0.1, 7), (2.0, 0.1, 8)],
    }
    assert not any(row["rate_at_edge"] for row in rows)


def test_the_factor_on_the_logits_is_the_best_one(bench):
    model, _ = bench.model("cross_entropy")
    held = bench.case.calibration[:4]
    made = margins.judge(model, held, {"held": held})
    figures = made["texts"]["held"]
    assert figures["perplexity_scaled"] <= figures["perplexity"]
    assert figures["right"] == made["right_on_rows_kept_out"]
    nats, _ = margins._nats_and_hits(model, held, (1.0,))
    assert math.log(figures["perplexity"]) == pytest.approx(nats[1.0])
    t = made["factor_on_logits"]
    around, _ = margins._nats_and_hits(model, held, (0.98 * t, t, 1.02 * t))
    assert around[t] == min(around.values())
