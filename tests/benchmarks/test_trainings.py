"""All of the fine-tuned comparison on a tiny random model."""

import json
import sys

import pytest
import torch

from benchmarks import finetuned, trainings
from benchmarks.trainings import HELD_EVERY, ROWS, Bench, Row, hold_out

WORDS = ["--quick", "--model", "gpt2-novels", "--only", "tied", "one", "--steps", "3"]
WORDS += ["--tokens-per-step", "64", "--context", "16", "--rates", "1e-2", "1e-3"]


@pytest.fixture
def start(tiny_case, tmp_path, monkeypatch):
    """Run the command with further words; returns its results."""
    rows = {
        "dense": Row("dense"),
        "tied": Row("tied", "signs", 0.9, "tied"),
        "untied": Row("untied", "signs", 0.9),
        "whole": Row("whole", "signs", 0.9, "tied", whole=True),
        "one": Row("one", "kmeans", 0.9),
    }
    for module in (trainings, finetuned):
        monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(finetuned, "load_case", lambda *_, **__: tiny_case)

    def run(*words, work="work", output="results.json"):
        output = tmp_path / output
        given = [*WORDS, "--work", str(tmp_path / work), "--output", str(output), *words]
        monkeypatch.setattr(sys, "argv", ["finetuned", *given])
        finetuned.main()
        return json.loads(output.read_text())

    return run


def test_results(start, tmp_path, capsys):
    result = start("--seeds", "0", "5")
    dense, tied, one = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["dense", "tied", "one"]
    assert result["candidate_rates"] == [1e-2, 1e-3]
    assert dense["factor"] == {"mean": 1, "least": 1, "most": 1, "deviation": 0}
    assert dense["texts"]["novels"]["agreement_tuned_dense"]["mean"] == 1
    assert dense["untuned"]["factor"] == 1
    for row in result["rows"]:
        assert [pair["seed"] for pair in row["seeds"]] == [0, 5]
        tried = row["held_out_nats_by_rate"]
        assert row["learning_rate"] == float(min(tried, key=tried.get))
        assert row["rate_at_edge"]
    assert tied["num_codebooks"] == 29
    assert tied["embeddings"] == "tied"
    # One codebook: no perplexity may be below the bound.
    bound = one["perplexity_bound"]["novels"]
    assert 1 < bound < one["texts"]["novels"]["perplexity"]["least"]
    assert "perplexity_bound" not in tied
    printed = capsys.readouterr().out
    assert "0 trainings left" in printed
    assert "one" in printed


def test_only_tied_heads_are_fitted_to_both_sides(start, monkeypatch):
    seen = []
    original = trainings.fit_head

    def record(quantiser, *arguments):
        seen.append(quantiser.besides)
        return original(quantiser, *arguments)

    monkeypatch.setattr(trainings, "fit_head", record)
    start("--seeds", "0", "--only", "tied", "untied")
    assert [besides is None for besides in seen] == [False, True]


def test_whole_models_are_distilled_once(start, monkeypatch):
    made = []
    original = trainings.Quantiser.trained_body

    def record(quantiser, head, embedding, steps, **options):
        made.append((steps, quantiser.states.versions, len(quantiser.states.blocks)))
        return original(quantiser, head, embedding, steps, **options)

    monkeypatch.setattr(trainings.Quantiser, "trained_body", record)
    first = start("--seeds", "0", "--only", "tied")
    second = start("--seeds", "0", "--only", "tied", "whole")  # the statistics are there by now
    tied, whole = second["rows"][1:]
    assert tied == first["rows"][1]
    assert whole["whole"]
    assert not tied["whole"]
    assert whole["untuned"]["factor"] != tied["untuned"]["factor"]
    again = start("--seeds", "0", "--only", "whole", output="again.json")
    assert again["rows"][1] == {**whole, "run": 0}
    assert made == [(4, 2, 2 * 105)]  # every 20th row is held out


def test_finished_runs_are_not_repeated(start, monkeypatch, capsys):
    first = start("--seeds", "0")
    capsys.readouterr()
    made = []
    original = trainings.fine_tune

    def record(*args, **options):
        made.append((options["learning_rate"], options["seed"]))
        return original(*args, **options)

    monkeypatch.setattr(trainings, "fine_tune", record)

    def refuse(*_):
        raise AssertionError("the heads are there")

    monkeypatch.setattr(trainings, "fit_head", refuse)
    again = start("--seeds", "0", output="again.json")
    assert again["rows"] == first["rows"]
    assert not made
    more = start("--seeds", "0", "1", output="more.json")
    rates = [row["learning_rate"] for row in first["rows"]]
    assert made == [(rate, 1) for rate in rates]
    assert [row["seeds"][0] for row in more["rows"]] == [row["seeds"][0] for row in first["rows"]]
    assert "2 trainings left" in capsys.readouterr().out
    for words, told in (
        (["--batch-size", "2"], "batch_size 4, not 2"),
        (["--rates", "1e-2"], "candidate_rates [0.01, 0.001], not [0.01]"),
    ):
        with pytest.raises(SystemExit):
            start("--seeds", "0", *words)
        assert f"of other settings ({told})" in capsys.readouterr().err


def test_rows_of_a_lost_work_folder_are_kept(start, monkeypatch):
    first = start("--seeds", "0", "--only", "one")
    models = []
    original = trainings.Bench.model

    def record(bench, row):
        models.append(row.name)
        return original(bench, row)

    monkeypatch.setattr(trainings.Bench, "model", record)
    second = start("--seeds", "0", "--only", "one", "tied", work="new")
    assert second["rows"][:2] == first["rows"]
    assert [row["name"] for row in second["rows"]] == ["dense", "one", "tied"]
    assert set(models) == {"dense", "tied"}
    alone = start("--seeds", "0", "--only", "tied", work="alone", output="alone.json")
    assert second["rows"][2]["texts"] == alone["rows"][1]["texts"]


def test_the_rate_is_chosen_by_the_text_kept_out(tiny_case, tmp_path, monkeypatch):
    bench = Bench(
        tiny_case,
        trainings.WorkFolder(tmp_path, {}),
        [ROWS["dense"]],
        schedule=trainings.Schedule(30, 64, 4, 16),
        rates=[1e-5, 1e-2],
        seeds=[3],
        distill_steps=1,
        body_distill_steps=1,
        evaluation_tokens=32,
        tell=lambda line: None,
    )
    trials = bench.trials(ROWS["dense"])
    assert [run["rate"] for run in trials] == [1e-5, 1e-2]
    assert trials[1]["held_out_nats"] < trials[0]["held_out_nats"]
    assert bench.trained(ROWS["dense"]) == {3: trials[1]}
    assert bench.texts["novels"].shape == (2, 17)


def test_text_kept_out_is_apart():
    blocks = torch.arange(45)[:, None]
    train, held = hold_out(blocks)
    assert held.flatten().tolist() == [HELD_EVERY - 1, 2 * HELD_EVERY - 1]
    assert sorted([*train.flatten().tolist(), *held.flatten().tolist()]) == list(range(45))
    train, held = hold_out(blocks[:3])
    assert (train.flatten().tolist(), held.flatten().tolist()) == ([0, 1], [2])
