import json
import random
import sys

import pytest
import torch

from benchmarks import gru_svm
from benchmarks.gru_svm_training import Recipe, build, trained
from benchmarks.work_folder import WorkFolder
from hf_vqlogits.gru_svm.nsl_kdd import FEATURES

pytest.importorskip("sklearn")


@pytest.fixture
def data(tmp_path):
    """Records in the form of NSL-KDD, in which attacks send more bytes."""
    import gzip

    draw = random.Random(0)
    folder = tmp_path / "nsl_kdd"
    folder.mkdir()
    for name, count in (("KDDTrain+_20Percent", 600), ("KDDTest+", 300)):
        lines = []
        for _ in range(count):
            values = dict.fromkeys(FEATURES, "0")
            values |= {
                "protocol_type": draw.choice(["tcp", "udp"]),
                "service": "http",
                "flag": "SF",
            }
            attack = draw.random() < 0.5
            values["src_bytes"] = str(draw.randrange(100) + 60 * attack)
            lines.append(",".join([*values.values(), "neptune" if attack else "normal", "20"]))
        with gzip.open(folder / f"{name}.txt.gz", "wt") as file:
            file.write("\n".join(lines) + "\n")
    return tmp_path


def test_both_losses_begin_alike_and_a_seed_decides_all():
    inputs = torch.randn(40, 6, 1)
    labels = (inputs.sum((1, 2)) > 0).long()
    svm, softmax = (Recipe(loss, 1e-2, epochs=2, batch=8, hidden_size=5) for loss in gru_svm.LOSSES)
    for one, other in zip(
        build(svm, 6, seed=3).gru.parameters(),
        build(softmax, 6, seed=3).gru.parameters(),
        strict=True,
    ):
        assert torch.equal(one, other)
    first, again = (trained(svm, inputs, labels, seed=1) for _ in range(2))
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_whole_and_going_on(data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results" / "gru_svm.json"
    words = ["gru_svm", "--quick", "--data", str(data), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(output)])
    gru_svm.main()
    told = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert output.with_suffix(".png").stat().st_size > 10_000
    networks = [row for row in result["rows"] if row["network"]]
    assert [(row["setting"], row["output_loss"]) for row in networks] == [
        ("paper", "squared_hinge"),
        ("paper", "cross_entropy"),
        ("papers_own", "cross_entropy"),
        ("tuned", "squared_hinge"),
        ("tuned", "cross_entropy"),
    ]
    for row in result["rows"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert sum(map(sum, row["confusion"])) == pytest.approx(300)
    assert [row["name"] for row in result["rows"][5:]] == [
        "linear SVM",
        "random forest",
        "gradient boosting",
    ]
    assert result["rows"][6]["accuracy"]["mean"] > 0.7
    assert len(result["claims"]) == 7
    kinds = [(one["what"], one["rows"]) for one in result["milliseconds"]]
    assert kinds == [("training", 64), *(("prediction", n) for n in (1, 256, 1024))]
    assert all(one[loss] > 0 for one in result["milliseconds"] for loss in gru_svm.LOSSES)
    for row in networks[3:]:
        tuned = result["tuning"][row["output_loss"]]
        assert (row["rate"], row["rate_at_edge"]) == (tuned["rate"], tuned["at_edge"])
    assert "1 record at a time" in told
    assert "more accurate than GRU-softmax (the best rate of each)" in told
    assert "src_bytes" not in result["constant_features"]

    # Everything is kept, so the same command trains nothing.
    def never(*inputs, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(gru_svm, "run_gru", never)
    monkeypatch.setattr(gru_svm, "run_peer", never)
    gru_svm.main()
    assert json.loads(output.read_text())["rows"] == result["rows"]


def test_rows_of_another_rate_are_other_trainings(tmp_path, monkeypatch):
    bench = object.__new__(gru_svm.Bench)
    bench.work, bench.seeds = WorkFolder(tmp_path, {}), [0, 1]
    bench.recipe, bench.train, bench.test = Recipe("squared_hinge", 1e-2), None, None
    asked = []

    def run(recipe, train, test, *, seed):
        asked.append((recipe.rate, recipe.dropout, seed))
        return {"accuracy": 0.5}

    monkeypatch.setattr(gru_svm, "run_gru", run)
    monkeypatch.setattr(gru_svm, "summary", lambda *_, **__: {})
    for rate, dropout in ((1e-2, 0.15), (1e-3, 0.15), (1e-3, 0.5), (1e-2, 0.15)):
        bench.row("tuned", "squared_hinge", rate, rate_at_edge=False, dropout=dropout)
    wanted = [(1e-2, 0.15), (1e-3, 0.15), (1e-3, 0.5)]  # what is there is not made again
    assert asked == [(*one, seed) for one in wanted for seed in (0, 1)]


def test_a_rate_that_diverges_is_no_candidate_and_kept(data, tmp_path, monkeypatch):
    output = tmp_path / "gru_svm.json"
    words = ["gru_svm", "--quick", "--data", str(data), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(output)])
    original, made = gru_svm.run_gru, []

    def run(recipe, *arguments, **options):
        made.append(recipe.rate)
        if recipe.rate > 2e-3:
            raise gru_svm.Diverged("the scores are not finite")
        return original(recipe, *arguments, **options)

    monkeypatch.setattr(gru_svm, "run_gru", run)
    gru_svm.main()
    tuning = json.loads(output.read_text())["tuning"]
    for found in tuning.values():
        assert found["rate"] < 2e-3
        assert {one["rate"]: one["accuracy"] for one in found["tried"]}[3e-3] is None
    assert max(made) == 3e-3
    made.clear()
    gru_svm.main()
    assert made == []
