"""GRU-SVM beside GRU-softmax and scikit-learn's classifiers on NSL-KDD, and the paper's claims.

    python -m benchmarks.gru_svm --work FOLDER --output benchmarks/results/gru_svm.json

Train on `KDDTrain+_20Percent`, test on `KDDTest+`, normal against attack. Both output layers are
trained with the same seeds (weights, order, dropout), in three settings: the paper's rate for
GRU-SVM for both; for GRU-softmax also the rate and dropout that the paper gives to it; and for each
output layer the rate, of those given or of some beyond the last of them, that is most accurate on a
fifth of the training records kept out. Test records choose nothing. Times are taken in turns: of a
step of the training, and of the classes of some records, which both output layers read off the
largest score. Every finished training is kept in `--work`, and the same command goes on from there
on the same machine. The ROC plot is written beside the JSON file.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_vqlogits.conversion.environment import machine
from hf_vqlogits.conversion.timing import paired_medians
from hf_vqlogits.gru_svm import GRUSVMFeatureExtractor, TrafficRecords, nsl_kdd_schema

from .detection import SCORES, Diverged, mean_confusion, mean_curve
from .gru_svm_claims import PAPER, accuracy_claim, time_claim
from .gru_svm_training import Recipe, build, peers, run_gru, run_peer, trainer
from .pairing import spread
from .rates import at_edge, best, search
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
PREDICTED_ROWS = (1, 256, 1024)  # of the times of prediction
SECONDS = ("training_seconds", "prediction_seconds")
Data = tuple[Tensor, Tensor]
Call = Callable[[str, int, int], Callable[[], Tensor]]  # of a loss, rows and a seed


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

        def run(rate: float) -> dict[str, Any]:
            name, recipe = f"rate-{loss}-{rate:g}", self._recipe(loss, rate)
            return self._run(name, recipe, train, judge, seed=0, may_diverge=True)

        def error(found: Mapping[str, Any]) -> float:
            return math.nan if "diverged" in found else 1.0 - found["accuracy"]

        found = search(run, self.rates, error)
        rate = best(found, error)
        return {
            "rate": rate,
            "at_edge": at_edge(rate, list(found)),
            "tried": [{"rate": one, "accuracy": run.get("accuracy")} for one, run in found.items()],
        }

    def row(
        self, setting: str, loss: str, rate: float, *, rate_at_edge: bool, **fields: Any
    ) -> dict[str, Any]:
        """One output layer in one setting, with all seeds."""
        recipe = self._recipe(loss, rate, **fields)
        name = f"{setting}-{loss}-rate{rate:g}-dropout{recipe.dropout:g}"
        runs = [
            self._run(f"{name}-{seed}", recipe, self.train, self.test, seed=seed)
            for seed in self.seeds
        ]
        more = {"setting": setting, "output_loss": loss, "rate": rate, "dropout": recipe.dropout}
        more["rate_at_edge"] = rate_at_edge
        return summary(f"{LOSSES[loss]}, {SETTINGS[setting]}", runs, network=True, **more)

    def peer_rows(self) -> list[dict[str, Any]]:
        """scikit-learn's classifiers."""
        rows = []
        # The GRU-SVM has its regulariser once in a batch, scikit-learn's once in all records.
        svm_c = self.recipe.svm_c * self.recipe.batch / len(self.train[0])
        for name, make in peers(svm_c, quick=self.quick).items():
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

    def times(self) -> list[dict[str, Any]]:
        """Milliseconds of each output layer in turns, each seed an own measurement.

        Of a step of the training (`"what": "training"`), and from inputs to classes
        (`"prediction"`), for so many `rows` at once.
        """
        wanted = [("training", self.recipe.batch, self._training_step)]
        wanted += [("prediction", rows, self._prediction) for rows in PREDICTED_ROWS]
        return [
            self.work.result(
                f"times-{what}-{rows}-{seed}", partial(self._times, what, rows, call, seed)
            )
            for what, rows, call in wanted
            for seed in self.seeds
        ]

    def _times(self, what: str, rows: int, call: Call, seed: int) -> dict[str, Any]:
        calls = {loss: call(loss, rows, seed) for loss in LOSSES}
        seconds = paired_medians(calls, torch.device("cpu"))
        milliseconds = {loss: 1e3 * found for loss, found in seconds.items()}
        return {"what": what, "seed": seed, "rows": rows, **milliseconds}

    def _training_step(self, loss: str, rows: int, seed: int) -> Callable[[], Tensor]:
        inputs, labels = (tensor[:rows] for tensor in self.train)
        recipe = self._recipe(loss, PAPER_RATE)
        step = trainer(build(recipe, inputs.shape[1], seed=seed).train(), recipe)
        return partial(step, inputs, labels)

    def _prediction(self, loss: str, rows: int, seed: int) -> Callable[[], Tensor]:
        inputs = self.test[0][:rows]
        model = build(self._recipe(loss, PAPER_RATE), inputs.shape[1], seed=seed).eval()
        return torch.no_grad()(lambda: model(inputs).logits.argmax(-1))

    def _recipe(self, loss: str, rate: float, **fields: Any) -> Recipe:
        return replace(self.recipe, output_loss=loss, rate=rate, **fields)

    def _run(
        self,
        name: str,
        recipe: Recipe,
        train: Data,
        judge: Data,
        *,
        seed: int,
        may_diverge: bool = False,
    ) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            try:
                return run_gru(recipe, train, judge, seed=seed)
            except Diverged as error:
                if not may_diverge:
                    raise
                return {"seed": seed, "rate": recipe.rate, "diverged": str(error)}

        known = self.work.has(name)
        run = self.work.result(name, make)
        if not known:
            told = run.get("diverged") or f"accuracy {run['accuracy']:.4f}"
            print(f"{name}: {told}", flush=True)
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


def claims(rows: list[dict[str, Any]], times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paper's claims beside the figures.

    Args:
        rows: of the networks.
        times: of [`Bench.times`].
    """
    runs = {(row["setting"], row["output_loss"]): row["runs"] for row in rows}
    found = []
    for setting, told in SETTINGS.items():
        svm = runs["paper" if setting == "papers_own" else setting, "squared_hinge"]
        found.append(accuracy_claim(told, svm, runs[setting, "cross_entropy"]))
    for (what, count), chosen in _grouped(times).items():
        svm, softmax = (
            [{"seed": one["seed"], "milliseconds": one[loss]} for one in chosen] for loss in LOSSES
        )
        records = f"{count:,} record{'s' if count > 1 else ''}"
        told = f"steps of {records}" if what == "training" else f"{records} at a time"
        found.append(time_claim(what, told, svm, softmax))
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
        "share_that_chooses_rates": HELD_OUT,
        "threads": torch.get_num_threads(),
        "processor": machine()["processor"],
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
    times = bench.times()
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
        milliseconds=[
            {"what": what, "rows": count, **_medians(some)}
            for (what, count), some in _grouped(times).items()
        ],
        paper=PAPER,
        claims=claims(rows, times),
    )
    write(result, options.output)
    plot(result["rows"], options.output.with_suffix(".png"))
    for claim in result["claims"]:
        print(describe(claim))


def _plan(tuning: Mapping[str, Any]) -> list[tuple[str, str, float, dict[str, Any]]]:
    given = {"rate_at_edge": False}
    own = {"dropout": SOFTMAX_DROPOUT, **given}
    return [
        *(("paper", loss, PAPER_RATE, given) for loss in LOSSES),
        ("papers_own", "cross_entropy", SOFTMAX_RATE, own),
        *(
            ("tuned", loss, found["rate"], {"rate_at_edge": found["at_edge"]})
            for loss, found in tuning.items()
        ),
    ]


def _grouped(times: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """By what was timed, and for how many rows."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in times:
        found.setdefault((one["what"], one["rows"]), []).append(one)
    return found


def _medians(times: list[dict[str, Any]]) -> dict[str, float]:
    return {loss: statistics.median(one[loss] for one in times) for loss in LOSSES}


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
