"""GRU-SVM beside GRU-softmax and scikit-learn's classifiers on NSL-KDD, and the paper's claims.

    python -m benchmarks.gru_svm --work FOLDER --output benchmarks/results/gru_svm.json

Train on `KDDTrain+_20Percent`, test on `KDDTest+`, normal against attack. Both output layers are
trained with the same seeds (weights, order, dropout), in three settings: the paper's rate for
GRU-SVM for both; for GRU-softmax also the rate and dropout that the paper gives to it; and for each
output layer the rate, of the same ones tried, that is most accurate on a fifth of the training
records kept out. Test records choose nothing. Every finished training is kept in `--work`, and the
same command goes on from there. The ROC plot is written beside the JSON file.
"""

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_vqlogits.conversion.timing import paired_medians
from hf_vqlogits.gru_svm import GRUSVMFeatureExtractor, TrafficRecords, nsl_kdd_schema

from .detection import SCORES, mean_confusion, mean_curve
from .gru_svm_claims import PAPER, accuracy_claim, time_claim
from .gru_svm_training import Recipe, build, peers, run_gru, run_peer
from .pairing import spread
from .rates import at_edge
from .record import record, write
from .roc_plot import plot
from .work_folder import WorkFolder

LOSSES = {"squared_hinge": "GRU-SVM", "cross_entropy": "GRU-softmax"}
PAPER_RATE = 1e-5
# The paper's table of hyper-parameters has a tenth of the rate and another dropout for softmax.
SOFTMAX_RATE, SOFTMAX_DROPOUT = 1e-6, 0.2
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SETTINGS = {
    "paper": "the paper's rate for both",
    "papers_own": "the paper's rate and dropout for softmax",
    "tuned": "the best rate of each",
}
HELD_OUT = 0.2
PREDICTED_ROWS = (1, 256)  # of the times of prediction
SECONDS = ("training_seconds", "prediction_seconds")
Data = tuple[Tensor, Tensor]


class Bench:
    """The records, the recipe and the folder of what is done.

    Args:
        train: training records.
        test: test records.
        work: where finished runs are kept.
        recipe: sizes of network and training; loss and rate are replaced.
        seeds: of every row.
        rates: those tried.
        quick: small peers as well.
    """

    def __init__(
        self,
        train: TrafficRecords,
        test: TrafficRecords,
        work: WorkFolder,
        recipe: Recipe,
        *,
        seeds: list[int],
        rates: tuple[float, ...],
        quick: bool,
    ):
        self.work, self.recipe, self.seeds, self.rates = work, recipe, seeds, rates
        self.quick = quick
        self.train_records = train
        self.extractor = GRUSVMFeatureExtractor(train.schema).fit(train)
        self.train, self.test = self._data(self.extractor, train), self._data(self.extractor, test)
        self.unknown = len(self.extractor.unknown_categories(test))

    @staticmethod
    def _data(extractor: GRUSVMFeatureExtractor, records: TrafficRecords) -> Data:
        features = extractor(records, return_tensors="pt")
        return features["input_values"], features["labels"]

    def tune(self, loss: str) -> dict[str, Any]:
        """Accuracy on training records kept out at every rate; encodings never see them."""
        order = np.random.default_rng(0).permutation(len(self.train_records))
        cut = int(HELD_OUT * len(order))
        kept, held_out = (self.train_records.select(rows) for rows in (order[cut:], order[:cut]))
        extractor = GRUSVMFeatureExtractor(kept.schema).fit(kept)
        train, judge = self._data(extractor, kept), self._data(extractor, held_out)
        found = {
            rate: self._run(f"rate-{loss}-{rate:g}", self._recipe(loss, rate), train, judge, seed=0)
            for rate in self.rates
        }
        best = max(found, key=lambda rate: found[rate]["accuracy"])
        return {
            "rate": best,
            "at_edge": at_edge(best, self.rates),
            "tried": [{"rate": rate, "accuracy": run["accuracy"]} for rate, run in found.items()],
        }

    def row(self, setting: str, loss: str, rate: float, **fields: Any) -> dict[str, Any]:
        """One output layer in one setting, with all seeds."""
        recipe = self._recipe(loss, rate, **fields)
        runs = [
            self._run(f"{setting}-{loss}-{seed}", recipe, self.train, self.test, seed=seed)
            for seed in self.seeds
        ]
        more = {"setting": setting, "output_loss": loss, "rate": rate, "dropout": recipe.dropout}
        return summary(f"{LOSSES[loss]}, {SETTINGS[setting]}", runs, network=True, **more)

    def peer_rows(self) -> list[dict[str, Any]]:
        """scikit-learn's classifiers."""
        rows = []
        for name, make in peers(quick=self.quick).items():
            runs = [
                self.work.result(
                    f"peer-{name.replace(' ', '_')}-{seed}",
                    partial(run_peer, make, self.train, self.test, seed=seed),
                )
                for seed in self.seeds
            ]
            rows.append(summary(name, runs, network=False))
            _show(rows[-1])
        return rows

    def prediction_times(self) -> list[dict[str, Any]]:
        """Milliseconds from inputs to classes in turns, each seed an own measurement."""
        return [
            self.work.result(f"times-{rows}-{seed}", partial(self._times, rows, seed))
            for rows in PREDICTED_ROWS
            for seed in self.seeds
        ]

    @torch.no_grad()
    def _times(self, rows: int, seed: int) -> dict[str, Any]:
        inputs = self.test[0][:rows]
        steps = inputs.shape[1]
        svm, softmax = (
            build(self._recipe(loss, PAPER_RATE), steps, seed=seed).eval() for loss in LOSSES
        )
        calls = {
            "squared_hinge": lambda: svm(inputs).logits[:, 1] > 0,
            "cross_entropy": lambda: softmax(inputs).logits.softmax(-1).argmax(-1),
        }
        seconds = paired_medians(calls, torch.device("cpu"))
        return {"seed": seed, "rows": rows, **{n: s * 1e3 for n, s in seconds.items()}}

    def _recipe(self, loss: str, rate: float, **fields: Any) -> Recipe:
        return replace(self.recipe, output_loss=loss, rate=rate, **fields)

    def _run(
        self, name: str, recipe: Recipe, train: Data, judge: Data, *, seed: int
    ) -> dict[str, Any]:
        known = self.work.has(name)
        run = self.work.result(name, lambda: run_gru(recipe, train, judge, seed=seed))
        if not known:
            told = f"{name}: accuracy {run['accuracy']:.4f}, {run['training_seconds']:.0f} s"
            print(told, flush=True)
        return run


def summary(name: str, runs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A row of the results: mean and spread over the runs, and every run without its curve."""
    return {
        "name": name,
        **more,
        **{score: spread([run[score] for run in runs]) for score in (*SCORES, *SECONDS)},
        "confusion": mean_confusion([run["confusion"] for run in runs]),
        "roc": mean_curve([run["roc"] for run in runs]),
        "runs": [{key: value for key, value in run.items() if key != "roc"} for run in runs],
    }


def claims(
    rows: list[dict[str, Any]], times: list[dict[str, Any]], *, test_records: int
) -> list[dict[str, Any]]:
    """The paper's claims beside the figures.

    Args:
        rows: of the networks.
        times: of [`Bench.prediction_times`].
        test_records: whose number the messages give.
    """
    runs = {(row["setting"], row["output_loss"]): row["runs"] for row in rows}
    found = []
    for setting, told in SETTINGS.items():
        svm = runs["paper" if setting == "papers_own" else setting, "squared_hinge"]
        found.append(accuracy_claim(told, svm, runs[setting, "cross_entropy"]))
    pair = (runs["paper", "squared_hinge"], runs["paper", "cross_entropy"])
    found.append(time_claim("faster training", SETTINGS["paper"], *pair, seconds=SECONDS[0]))
    told = f"all {test_records:,} test records"
    found.append(time_claim("faster prediction", told, *pair, seconds=SECONDS[1]))
    for count in PREDICTED_ROWS:
        chosen = [one for one in times if one["rows"] == count]
        svm, softmax = (
            [{"seed": one["seed"], "milliseconds": one[loss]} for one in chosen] for loss in LOSSES
        )
        what = "1 record at a time" if count == 1 else f"{count} records at a time"
        found.append(time_claim("faster prediction", what, svm, softmax, seconds="milliseconds"))
    return found


def main() -> None:
    """Measure, write and show."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--work", type=Path, required=True, help="folder of what is done")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--quick", action="store_true", help="a small network, few records, two seeds")
    p.add_argument("--output", type=Path, required=True)
    options = p.parse_args()
    seeds, rates = (options.seeds[:2], RATES[-2:]) if options.quick else (options.seeds, RATES)
    recipe = Recipe("squared_hinge", PAPER_RATE)
    schema, folder = nsl_kdd_schema(), options.data / "nsl_kdd"
    extractor = GRUSVMFeatureExtractor(schema)
    train = extractor.read(folder / "KDDTrain+_20Percent.txt.gz")
    test = extractor.read(folder / "KDDTest+.txt.gz")
    if options.quick:
        recipe = replace(recipe, epochs=2, batch=64, hidden_size=8)
        train, test = train.select(np.arange(600)), test.select(np.arange(300))
    settings = {
        "recipe": asdict(recipe),
        "rates": rates,
        "records": [len(train), len(test)],
        "features": "quantile bins and indices",
        "threads": torch.get_num_threads(),
    }
    work = WorkFolder(options.work, settings)
    bench = Bench(train, test, work, recipe, seeds=seeds, rates=rates, quick=options.quick)
    tuning = {loss: bench.tune(loss) for loss in LOSSES}
    for loss, found in tuning.items():
        edge = ", the first or last of those tried" if found["at_edge"] else ""
        print(f"{LOSSES[loss]}: best rate {found['rate']:g}{edge}")
    rows = []
    for setting, loss, rate, fields in _plan(tuning):
        rows.append(bench.row(setting, loss, rate, **fields))
        _show(rows[-1])
    peer_rows = bench.peer_rows()
    times = bench.prediction_times()
    result = record(
        "gru_svm",
        "scikit-learn",
        settings=settings,
        seeds=seeds,
        test_share_of_attacks=float(bench.test[1].double().mean()),
        unknown_categories_in_test=bench.unknown,
        constant_features=list(bench.extractor.constant_features),
        tuning=tuning,
        rows=rows + peer_rows,
        prediction_milliseconds=_grouped(times),
        paper=PAPER,
        claims=claims(rows, times, test_records=len(test)),
    )
    write(result, options.output)
    plot(result["rows"], options.output.with_suffix(".png"))
    for claim in result["claims"]:
        print(describe(claim))


def _plan(tuning: Mapping[str, Any]) -> list[tuple[str, str, float, dict[str, Any]]]:
    own = {"dropout": SOFTMAX_DROPOUT}
    return [
        *(("paper", loss, PAPER_RATE, {}) for loss in LOSSES),
        ("papers_own", "cross_entropy", SOFTMAX_RATE, own),
        *(("tuned", loss, tuning[loss]["rate"], {}) for loss in LOSSES),
    ]


def _grouped(times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "rows": count,
            **{
                loss: statistics.median(one[loss] for one in times if one["rows"] == count)
                for loss in LOSSES
            },
        }
        for count in PREDICTED_ROWS
    ]


def describe(claim: Mapping[str, Any]) -> str:
    """One line on a claim."""
    measured = claim["measured"]
    return (
        f"{claim['claim']} ({claim['setting']}): {claim['verdict']}; {claim['unit']} "
        f"{measured['mean']:.3f} ({measured['least']:.3f} to {measured['most']:.3f}), in the paper "
        f"{claim['paper']:.3f}"
    )


def _show(row: Mapping[str, Any]) -> None:
    scores = ", ".join(f"{score} {row[score]['mean']:.4f}" for score in SCORES)
    print(
        f"{row['name']}: {scores}; {row['training_seconds']['mean']:.1f} s of training, "
        f"{row['prediction_seconds']['mean']:.2f} s of prediction; confusion {row['confusion']}"
    )


if __name__ == "__main__":
    main()
