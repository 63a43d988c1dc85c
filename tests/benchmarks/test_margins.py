"""The whole benchmark on a tiny random model."""

import json
import math
import sys

import pytest
import torch

from benchmarks import margins


def test_both_losses_learn_and_are_judged(tiny_case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(margins, "load_case", lambda *_, **__: tiny_case)
    monkeypatch.setattr(margins, "further_novels", lambda case, *_: case.calibration)
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
        assert {made["learning_rate"] for made in row["learning_rates"]} >= {1e-2, 3e-2}
        for name in row["chosen_by"]:
            of = margins.CRITERIA[name]
            assert of(row["runs"][0]) == min(map(of, row["learning_rates"]))
        for made in row["runs"]:
            # Each token is followed by a certain one of 40.
            assert made["texts"]["novels"]["right"] > 0.5
            assert made["texts"]["novels"]["perplexity_scaled"] < 20
    margin = rows["squared_hinge"]["runs"][0]
    assert margin["factor_on_logits"] > 1
    assert margin["texts"]["novels"]["perplexity"] > margin["texts"]["novels"]["perplexity_scaled"]
    assert "of tokens right" in capsys.readouterr().out

    monkeypatch.setattr(margins, "fine_tune", None)  # nothing is trained again
    margins.main()
    assert json.loads(output.read_text()) == result
    words[2] = "61"
    monkeypatch.setattr(sys, "argv", [*words, "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match="2"):
        margins.main()
    assert "is of other settings" in capsys.readouterr().err


def test_only_the_loss_and_the_common_codeword_differ(tiny_case):
    models = [margins.make_model(tiny_case, 0.9, loss, 0) for loss in margins.OUTPUT_LOSSES]
    one, other = (model.lm_head for model in models)
    assert torch.equal(one.codebook[1:], other.codebook[1:])
    assert torch.equal(one.codes[:, 1:], other.codes[:, 1:])
    assert (other.codes[:, 0] & 1).all()
    assert one.num_fine_tokens == 0
    hidden = torch.zeros(1, one.in_features)
    torch.testing.assert_close(other(hidden), torch.full((1, 300), -1.0), atol=1e-3, rtol=0)
    for model in models:
        body, source = model.model.backbone.state_dict(), tiny_case.parts.backbone.state_dict()
        assert all(torch.equal(body[name], source[name]) for name in source)


def test_the_factor_on_the_logits_is_the_best_one(tiny_case):
    model = margins.make_model(tiny_case, 0.9, "cross_entropy", 0).eval()
    held = tiny_case.calibration[:4]
    made = margins.judge(model, held, {"held": held})
    figures = made["texts"]["held"]
    assert figures["perplexity_scaled"] <= figures["perplexity"]
    assert figures["right"] == made["right_on_rows_kept_out"]
    nats, _ = margins._nats_and_hits(model, held, (1.0,))
    assert math.log(figures["perplexity"]) == pytest.approx(nats[1.0])
