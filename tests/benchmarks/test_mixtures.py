"""The whole benchmark on a tiny random model."""

import json
import sys

import pytest
import torch

from benchmarks import mixtures
from benchmarks.training import Schedule
from benchmarks.trainings import hold_out
from benchmarks.work_folder import WorkFolder


def test_results_and_table(tiny_case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mixtures, "load_case", lambda *_, **__: tiny_case)
    monkeypatch.setattr(mixtures, "other_domain", lambda case, *_, **__: case)
    monkeypatch.setattr(mixtures, "RATES", (1e-2, 3e-2))
    monkeypatch.setattr(mixtures, "SEEDS", (0, 1))
    output = tmp_path / "mixtures.json"
    words = ["mixtures", "--steps", "30", "--param-reduction", "0.8", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    mixtures.main()
    result = json.loads(output.read_text())
    rows = {(row["num_mixtures"], row["gate_activation"]): row for row in result["rows"]}
    assert list(rows) == list(mixtures.MIXTURES)
    one = rows[1, "linear"]
    for (num_mixtures, _), row in rows.items():
        tried, runs = row["tried"], row["runs"]
        layers = {made["layer_factor"] for made in tried}
        factors = {made["mixture_factor"] for made in tried}
        if num_mixtures == 1:
            assert layers >= set(mixtures.LAYER_FACTORS)
            assert factors == {1.0}
        else:
            assert layers == {one["runs"][0]["layer_factor"]}
            assert factors >= set(mixtures.MIXTURE_FACTORS)
        assert len({made["learning_rate"] for made in tried}) >= 2
        assert len({made["held_out_nats"] for made in tried}) == len(tried)  # every rate is used
        assert isinstance(row["factor_at_edge"], bool)
        assert runs[0]["held_out_nats"] <= min(made["held_out_nats"] for made in tried)
        assert (row["untrained_differences"] is None) == (num_mixtures == 1)
        assert [made["seed"] for made in runs] == [0, 1]
        assert {mixtures.rates_of({"runs": [made]}) for made in runs} == {mixtures.rates_of(row)}
        assert 0.9 < row["float_parameters"] / one["float_parameters"] <= 1
        assert all(seconds > 0 for seconds in row["seconds"].values())
        for made in row["runs"]:
            # Each token is followed by a certain one of 40.
            assert made["perplexity"]["novels"] < 0.5 * row["untrained"]["novels"]
            assert ("shares" in made) == (num_mixtures > 1)
            if num_mixtures > 1:
                assert sum(made["shares"]["mean"]) == pytest.approx(1, abs=1e-4)
                assert made["shares"]["largest"] >= 1 / num_mixtures
                assert made["differences"]["factors"] > 0
    printed = capsys.readouterr().out
    assert "mixtures of softmaxes" in printed

    monkeypatch.setattr(mixtures.Bench, "run", None)  # nothing is made again
    mixtures.main()
    assert json.loads(output.read_text()) == result


def test_parameters_are_as_many_or_a_few_less():
    for num_mixtures in (2, 4, 8):
        one = mixtures.size_of(1, 50257, 256, 0.99)
        size = mixtures.size_of(num_mixtures, 50257, 256, 0.99)
        assert size.num_fine_tokens == one.num_fine_tokens
        wanted = one.num_codebooks * 257
        per_codeword = 257 + 2 * num_mixtures
        parameters = size.num_codebooks * per_codeword + 257 * num_mixtures
        assert 0 <= wanted - parameters < per_codeword


def test_rows_that_choose_the_rate_are_kept_out_and_models_are_their_own(tiny_case, tmp_path):
    schedule = Schedule(1, tokens_per_step=16, batch_size=1, context=16)
    work = WorkFolder(tmp_path, {})
    bench = mixtures.Bench(tiny_case, work, schedule, 0)
    train, held = hold_out(tiny_case.calibration)
    assert torch.equal(bench.held["held"], held)
    assert torch.equal(bench.rows, train[:, :-1])
    assert torch.equal(bench.quantiser.corpus.calibration, train)  # the fit knows no more
    size = mixtures.size_of(2, 300, 32, 0.8)
    head = bench.fitted(size)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    again = mixtures.Bench(tiny_case, work, schedule, 1).fitted(size)  # kept, not fitted anew
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    gate = {"num_mixtures": 2, "gate_activation": "gelu"}
    bench.run(size, head, gate, mixtures.Rates(1e-1, 1.0, 2.0), 0)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    one, other = (bench.model(size, head, gate, seed) for seed in (0, 1))
    assert one.lm_head.gate_activation == "gelu"
    assert not torch.equal(one.lm_head.factors, other.lm_head.factors)


def test_results_of_other_settings_are_refused(tmp_path, monkeypatch, capsys, tiny_case):
    monkeypatch.setattr(mixtures, "load_case", lambda *_, **__: tiny_case)
    monkeypatch.setattr(mixtures, "other_domain", lambda case, *_, **__: case)
    output = tmp_path / "mixtures.json"
    output.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["mixtures", "--quick", "--output", str(output)])
    with pytest.raises(SystemExit, match="2"):
        mixtures.main()
    assert "holds no results of benchmarks.mixtures" in capsys.readouterr().err
