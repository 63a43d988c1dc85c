"""Models of one case and their trainings, each made once and kept in a work folder."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import HeadSize, choose_size

from .calibrated import calibrated
from .models import dense_model, fit_head, kept_head, quantised_model
from .pairing import Run
from .protocol import Case
from .rates import best
from .training import Schedule, fine_tune, first_tokens, judge, training_rows
from .work_folder import WorkFolder

HELD_EVERY = 20
DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """A model of the comparison.

    Attributes:
        name: short, as on the command line.
        method: of the converter; None is the dense model.
        reduction: share of the output layer's parameters that it saves.
        embeddings: `"keep"` or `"tied"`.
        whole: after the head the whole model is distilled from the original, before it is tuned.
    """

    name: str
    method: str | None = None
    reduction: float = 0.0
    embeddings: str = "keep"
    whole: bool = False


ROWS = {
    row.name: row
    for row in (
        Row(DENSE),
        Row("signs-99", "signs", 0.99),
        Row("signs-98", "signs", 0.98),
        Row("signs-96", "signs", 0.96),
        Row("kmeans-99", "kmeans", 0.99),
        Row("whole-99", "signs", 0.99, whole=True),
        Row("whole-98", "signs", 0.98, whole=True),
        Row("whole-tied-98", "signs", 0.98, "tied", whole=True),
        Row("whole-tied-96", "signs", 0.96, "tied", whole=True),
    )
}


class Bench:
    """Models of one case, their trainings, and what of these is done.

    Args:
        case: model and text.
        work: folder of what is done.
        rows: of the benchmark.
        schedule: of every training; its `head_factor` is part of a run's name.
        rates: learning rates to choose from.
        seeds: of the trainings, the first that of the choice.
        distill_steps: of every head.
        body_distill_steps: of the models that are distilled as a whole, after their heads.
        evaluation_tokens: of each text.
        tell: prints a line after every training.
        fit_seed: of the fit and the distillation.
    """

    def __init__(
        self,
        case: Case,
        work: WorkFolder,
        rows: Sequence[Row],
        *,
        schedule: Schedule,
        rates: Sequence[float],
        seeds: Sequence[int],
        distill_steps: int,
        body_distill_steps: int,
        evaluation_tokens: int,
        tell: Callable[[str], None] = print,
        fit_seed: int = 0,
    ):
        self.case, self.rows = case, rows
        self._work, self._schedule = work, schedule
        self.rates, self.seeds = rates, seeds
        self._distill_steps, self._body_distill_steps = distill_steps, body_distill_steps
        self._tell = tell
        self._seconds: dict[str, list[float]] = {}
        self.texts = {
            text: first_tokens(blocks, evaluation_tokens)
            for text, blocks in case.evaluation.items()
        }
        train, self._held = hold_out(case.calibration)
        self._text = training_rows(train, schedule.context)
        self._quantiser = Quantiser(
            case.parts, replace(case.corpus(), calibration=train), fit_seed, show_progress=True
        )

    def head(self, row: Row) -> tuple[HeadSize, VQLogitsHead]:
        """The fitted and distilled head of a row.

        A tied one is fitted to both sides, but not distilled end to end: the whole model trains.
        """
        method = row.method
        assert method is not None
        vocab_size, hidden_size = self.case.parts.weight.shape
        size = choose_size(
            method,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            param_reduction=row.reduction,
        )
        name = f"head-{method}-{row.reduction}-{row.embeddings}"

        def make() -> VQLogitsHead:
            statistics, _ = calibrated(self.case, self._quantiser, self._work)
            self._quantiser.besides = self._input_metric() if row.embeddings == "tied" else None
            head = kept_head(
                self._work,
                f"{name}-fitted",
                self._quantiser,
                size,
                lambda: fit_head(self._quantiser, method, size, statistics),
            )
            state_file = self._work.path(f"{name}-distillation.pt")
            self._quantiser.distill(head, self._distill_steps, statistics, state_file=state_file)
            return head

        return size, kept_head(self._work, name, self._quantiser, size, make)

    def _input_metric(self) -> Tensor:
        found = self._work.tensors("inputs", lambda: {"metric": self._quantiser.input_metric()})
        metric: Tensor = found["metric"]
        return metric

    def model(self, row: Row) -> PreTrainedModel:
        """A fresh copy of a row's model."""
        if row.method is None:
            return dense_model(self.case.parts)
        size, head = self.head(row)
        model = quantised_model(self._quantiser, size, head, embeddings=row.embeddings)
        if row.whole:
            model.load_state_dict(self._distilled(row, size, head))
        return model

    def _distilled(self, row: Row, size: HeadSize, head: VQLogitsHead) -> dict[str, Any]:
        """Tensors of a row's model after the distillation of body and head."""
        name = f"{row.name}-distilled"

        def make() -> dict[str, Any]:
            calibrated(self.case, self._quantiser, self._work)
            model = quantised_model(
                self._quantiser,
                size,
                head,
                embeddings=row.embeddings,
                body_steps=self._body_distill_steps,
                state_file=self._work.path(f"{name}-state.pt"),
            )
            return model.state_dict()

        return self._work.tensors(name, make)

    def untuned(self, row: Row) -> Run:
        """A row's model before any training."""
        return self._work.result(f"{row.name}-untuned", lambda: self._judged(self.model(row)))

    def run(self, row: Row, rate: float, seed: int) -> Run:
        """A training."""

        def make() -> dict[str, Any]:
            start = time.perf_counter()
            model = self.model(row)
            losses = fine_tune(model, self._text, self._schedule, learning_rate=rate, seed=seed)
            held = judge(model, {"held out": self._held})["held out"].nats
            return {
                "row": row.name,
                "rate": rate,
                "seed": seed,
                "held_out_nats": held,
                "first_loss": losses[0],
                "last_loss": losses[-1],
                **self._judged(model),
                "seconds": time.perf_counter() - start,
            }

        name = self.run_name(row, rate, seed)
        done = self._work.has(name)
        found = self._work.result(name, make)
        if not done:
            self._tell_of(row, found)
        return found

    def run_name(self, row: Row, rate: float, seed: int) -> str:
        """Name of a training in the work folder."""
        factor = "" if row.method is None else f"-factor{self._schedule.head_factor:g}"
        return f"{row.name}-rate{rate:g}{factor}-seed{seed}"

    def trials(self, row: Row) -> list[Run]:
        """Trainings of a row at every rate, with the first seed."""
        return [self.run(row, rate, self.seeds[0]) for rate in self.rates]

    def trained(self, row: Row) -> dict[int, Run]:
        """Trainings of a row at the rate that was best with the first seed, by seed."""
        rate = self._best_rate(row)
        return {seed: self.run(row, rate, seed) for seed in self.seeds}

    def missing(self, row: Row) -> int:
        """Trainings of a row that are still to be made."""
        first, *others = self.seeds
        undone = sum(not self._work.has(self.run_name(row, rate, first)) for rate in self.rates)
        if undone:
            return undone + len(others)
        rate = self._best_rate(row)
        return sum(not self._work.has(self.run_name(row, rate, seed)) for seed in others)

    def _best_rate(self, row: Row) -> float:
        by_rate = {run["rate"]: run for run in self.trials(row)}
        return best(by_rate, lambda run: float(run["held_out_nats"]))

    def _tell_of(self, row: Row, run: Run) -> None:
        """Say how a training went, and how long the missing ones will take at this pace."""
        self._seconds.setdefault(row.name, []).append(run["seconds"])
        every = [seconds for some in self._seconds.values() for seconds in some]
        missing = {one.name: self.missing(one) for one in self.rows}
        left = sum(count * mean(self._seconds.get(name, every)) for name, count in missing.items())
        self._tell(
            f"{row.name}, rate {run['rate']:g}, seed {run['seed']}: {run['seconds']:.0f} s, loss "
            f"{run['held_out_nats']:.4f} on text kept out; {sum(missing.values())} trainings "
            f"left, about {left / 60:.0f} min beside fits"
        )

    def _judged(self, model: PreTrainedModel) -> dict[str, Any]:
        return {
            "texts": {
                text: {
                    "nats": score.nats,
                    "tokens": score.tokens,
                    "choices": score.choices.tolist(),
                }
                for text, score in judge(model, self.texts).items()
            }
        }


def hold_out(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Text to train on, and every `HELD_EVERY`-th row, or the last of fewer, to choose rates by."""
    held = torch.zeros(len(blocks), dtype=torch.bool)
    held[HELD_EVERY - 1 :: HELD_EVERY] = True
    held[-1] |= not bool(held.any())
    return blocks[~held], blocks[held]
