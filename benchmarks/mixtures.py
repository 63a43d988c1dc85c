"""Mixtures of M softmaxes over one codebook, at equal parameters and after equal training.

    python -m benchmarks.mixtures --work FOLDER --output benchmarks/results/mixtures.json

Each row is a head for gpt2-novels that the converter fits to WikiText-2, which the model has not
seen, of as many parameters as sign codes at `--param-reduction`: a mixture has fewer codewords, and
so fewer bits a token, by what its gate, factors and shifts take. It is split, and the whole model
trains on that text, no row twice: the same rows in the same order, the best of some learning rates,
or of some beyond the last of them, by the loss on rows kept out of fit and training. The layer
learns at one of `LAYER_FACTORS` times the rate of the body, or some beyond, the best one for one
softmax at the rate in the middle; mixtures take the same. Their components begin nearly alike, so
what only a mixture has learns at one of `MIXTURE_FACTORS` times the rate of the layer, chosen
alike. Judged on other text, before and after; beside it the time of one row's logits and of the
loss of 256 rows, in turns with one softmax.

Each training is kept in `--work` and each row is written when it is done; what is there is not made
again.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.conversion.calibration import CalibrationStatistics
from hf_vqlogits.conversion.environment import machine
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import HeadSize, choose_size
from hf_vqlogits.conversion.timing import paired_medians
from hf_vqlogits.gates import LINEAR
from hf_vqlogits.mixture import VQLogitsMixtureHead

from .calibrated import calibrated
from .models import fit_head, kept_head, quantised_model
from .protocol import Case, load_case, other_domain
from .rates import at_edge, best, search
from .results_file import ResultsFile
from .training import Schedule, fine_tune, judge, training_rows
from .trainings import hold_out
from .work_folder import WorkFolder

# M and the activation of the gate. One softmax comes first: mixtures are trained as suits it.
MIXTURES = ((1, LINEAR), (2, LINEAR), (2, "gelu"), (4, LINEAR))
RATES = (3e-4, 1e-3, 3e-3)
LAYER_FACTORS = (1.0, 3.0, 9.0)
MIXTURE_FACTORS = (0.1, 0.3, 1.0)
SEEDS = (0, 1, 2)
LOSS_ROWS = 256


def size_of(num_mixtures: int, vocab_size: int, hidden_size: int, reduction: float) -> HeadSize:
    """Size of a head that has, split, as many parameters as one softmax, or a few less."""
    plain = choose_size(
        "signs", vocab_size=vocab_size, hidden_size=hidden_size, param_reduction=reduction
    )
    if num_mixtures == 1:
        return plain
    row = hidden_size + 1
    parameters = plain.num_codebooks * row - num_mixtures * row
    return replace(plain, num_codebooks=parameters // (row + 2 * num_mixtures))


class Rates(NamedTuple):
    """Learning rates of one training.

    Attributes:
        body: after the warm-up.
        layer: of the output layer, over that of the body.
        mixture: of what only a mixture has, over that of the layer.
    """

    body: float
    layer: float
    mixture: float = 1.0

    def __str__(self) -> str:
        return f"rates {self.body:g} x{self.layer:g} x{self.mixture:g}"


class Bench:
    """A model and the text that its heads are fitted and trained on.

    Args:
        case: heads are fitted to its calibration text, and trained on it; a twentieth of its rows
            is kept out of both and chooses the learning rate.
        work: where the statistics of the calibration text, heads and trainings are kept.
        schedule: of every training.
        seed: of the fit.
    """

    def __init__(self, case: Case, work: WorkFolder, schedule: Schedule, seed: int):
        self.case, self.work = case, work
        train, held = hold_out(case.calibration)
        self.held = {"held": held}
        self.rows = training_rows(train, schedule.context)
        self.schedule = schedule
        corpus = replace(case.corpus(), calibration=train)
        self.quantiser = Quantiser(case.parts, corpus, seed, show_progress=True)
        self.statistics: CalibrationStatistics
        self.statistics, _ = calibrated(case, self.quantiser, work)

    def fitted(self, size: HeadSize) -> VQLogitsHead:
        """A plain head."""
        return kept_head(
            self.work,
            f"head-{size.num_codebooks}",
            self.quantiser,
            size,
            lambda: fit_head(self.quantiser, "signs", size, self.statistics),
        )

    def model(self, size: HeadSize, head: VQLogitsHead, gate: dict[str, Any], seed: int) -> Any:
        """A model of its own around a copy of the head, split."""
        model: Any = quantised_model(self.quantiser, size, head)
        if gate["num_mixtures"] > 1:
            model.split_head(**gate, seed=seed)
        return model.eval()

    def run(
        self,
        size: HeadSize,
        head: VQLogitsHead,
        gate: dict[str, Any],
        rates: Rates,
        seed: int,
    ) -> dict[str, Any]:
        """Train one model, and judge it."""

        def make() -> dict[str, Any]:
            model = self.model(size, head, gate, seed)
            schedule = replace(self.schedule, head_factor=rates.layer, mixture_factor=rates.mixture)
            losses = fine_tune(model, self.rows, schedule, learning_rate=rates.body, seed=seed)
            made: dict[str, Any] = {
                "learning_rate": rates.body,
                "layer_factor": rates.layer,
                "mixture_factor": rates.mixture,
                "seed": seed,
                "held_out_nats": judge(model, self.held)["held"].nats,
                "last_losses": mean(losses[-max(1, len(losses) // 10) :]),
                "perplexity": self.perplexities(model),
            }
            if gate["num_mixtures"] > 1:
                made |= {"shares": self.shares(model), "differences": differences(model.lm_head)}
            print(f"{gate}, {rates}, seed {seed}: {made['held_out_nats']:.4f} nats", flush=True)
            return made

        kind = f"{gate['num_mixtures']}-{gate['gate_activation']}"
        name = f"rate{rates.body:g}-layer{rates.layer:g}-mixture{rates.mixture:g}-seed{seed}"
        return self.work.result(f"{kind}-{name}", make)

    def trainings(
        self,
        size: HeadSize,
        head: VQLogitsHead,
        gate: dict[str, Any],
        rates: Sequence[float],
        seeds: Sequence[int],
        *,
        layer_factor: float | None,
    ) -> dict[str, Any]:
        """All that were tried with the first seed, and all seeds of the best one.

        Args:
            size: of the head.
            head: fitted.
            gate: of the mixture.
            rates: of the body, those tried.
            seeds: of the trainings.
            layer_factor: of a mixture, the best one of one softmax.
        """
        first, *others = seeds
        tried: dict[Rates, dict[str, Any]] = {}

        def train(one: Rates) -> dict[str, Any]:
            tried[one] = self.run(size, head, gate, one, first)
            return tried[one]

        def loss(made: Mapping[str, Any]) -> float:
            return float(made["held_out_nats"])

        middle = sorted(rates)[len(rates) // 2]
        if layer_factor is None:
            layers = search(lambda layer: train(Rates(middle, layer)), LAYER_FACTORS, loss)
            layer, mixture = best(layers, loss), 1.0
            factor_at_edge = at_edge(layer, list(layers))
        else:
            layer = layer_factor
            factors = search(lambda f: train(Rates(middle, layer, f)), MIXTURE_FACTORS, loss)
            mixture = best(factors, loss)
            factor_at_edge = at_edge(mixture, list(factors))
        found = search(lambda rate: train(Rates(rate, layer, mixture)), rates, loss)
        chosen = Rates(best(found, loss), layer, mixture)
        return {
            "rate_at_edge": at_edge(chosen.body, list(found)),
            "factor_at_edge": factor_at_edge,
            "tried": list(tried.values()),
            "runs": [
                tried[chosen],
                *(self.run(size, head, gate, chosen, seed) for seed in others),
            ],
        }

    def perplexities(self, model: Any) -> dict[str, float]:
        """By text."""
        return {text: s.perplexity for text, s in judge(model, self.case.evaluation).items()}

    @torch.no_grad()
    def shares(self, model: Any) -> dict[str, Any]:
        """How the gate shares the rows kept out: the mean of each component, and of the largest."""
        ids = self.held["held"][:, :-1]
        hidden = model.base_model(ids).last_hidden_state.flatten(0, 1).float()
        gate = model.lm_head.log_gate(hidden).exp()
        return {"mean": gate.mean(0).tolist(), "largest": float(gate.max(-1).values.mean())}


@torch.no_grad()
def differences(head: VQLogitsMixtureHead) -> dict[str, float]:
    """How far components are from their mean, root mean square: factors, and shifts likewise."""
    return {
        name: float((tensor - tensor.mean(0)).square().mean().sqrt())
        for name, tensor in (("factors", head.factors), ("shifts", head.shifts))
    }


def measure(
    bench: Bench,
    results: ResultsFile,
    *,
    kinds: Sequence[tuple[int, str]],
    reduction: float,
    rates: Sequence[float],
    seeds: Sequence[int],
) -> None:
    """Make the rows that are missing: the best rate by the first seed, then all seeds."""
    vocab_size, hidden_size = bench.case.parts.weight.shape
    one = size_of(1, vocab_size, hidden_size, reduction)
    plain: VQLogitsHead | None = None
    for num_mixtures, activation in kinds:
        if results.has(num_mixtures=num_mixtures, gate_activation=activation):
            continue
        gate = {"num_mixtures": num_mixtures, "gate_activation": activation}
        size = size_of(num_mixtures, vocab_size, hidden_size, reduction)
        head = bench.fitted(size)
        untrained = bench.model(size, head, gate, seeds[0])
        of_one = [row for row in results.rows if row["num_mixtures"] == 1]
        layer_factor = of_one[0]["runs"][0]["layer_factor"] if num_mixtures > 1 else None
        trainings = bench.trainings(size, head, gate, rates, seeds, layer_factor=layer_factor)
        if plain is None:
            plain = head if num_mixtures == 1 else bench.fitted(one)
        row = {
            **gate,
            "num_codebooks": size.num_codebooks,
            **untrained.lm_head.storage(),
            "untrained": bench.perplexities(untrained),
            "untrained_differences": differences(untrained.lm_head) if num_mixtures > 1 else None,
            **trainings,
            "seconds": times(plain, untrained.lm_head),
        }
        results.add([row])


def times(plain: VQLogitsHead, head: VQLogitsHead) -> dict[str, float]:
    """Seconds of one row's logits and of the loss, forward and backward, with and without it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(LOSS_ROWS, head.in_features, generator=generator)
    labels = torch.randint(0, head.out_features, (LOSS_ROWS,), generator=generator)

    # Copies of all: where in memory a layer happened to lie has been worth a sixth of the time.
    def logits(layer: VQLogitsHead) -> Callable[[], Tensor]:
        layer = copy.deepcopy(layer)
        return torch.no_grad()(lambda: layer(hidden[:1]))

    def loss(layer: VQLogitsHead) -> Callable[[], Tensor]:
        layer = copy.deepcopy(layer).requires_grad_(True)
        rows = hidden.clone().requires_grad_(True)

        def step() -> Tensor:
            value = layer(rows, labels)
            torch.autograd.grad(value, [rows, *layer.parameters()])
            return value.detach()

        return step

    calls = {"logits": logits(head), "logits_of_one_softmax": logits(plain)}
    calls |= {"loss": loss(head), "loss_of_one_softmax": loss(plain)}
    # Each finds in cache what it reads: else the first of two alike would fetch it for the other.
    return paired_medians(calls, hidden.device, lambda call: call())


def rates_of(row: Mapping[str, Any]) -> Rates:
    """The rates of a row's runs."""
    run = row["runs"][0]
    return Rates(run["learning_rate"], run["layer_factor"], run["mixture_factor"])


def show(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print means over seeds."""
    table = Table(title="mixtures of softmaxes, gpt2-novels")
    for column in ("M", "gate", "rate", "R", "parameters", "untrained", "trained", "least to most"):
        table.add_column(column, justify="right")
    for column in ("largest share", "factors differ", "logits, one row", "loss"):
        table.add_column(column, justify="right")
    for row in rows:
        for text in row["untrained"]:
            found = [made["perplexity"][text] for made in row["runs"]]
            seconds = row["seconds"]
            gated = [made["shares"]["largest"] for made in row["runs"] if "shares" in made]
            differ = [made["differences"]["factors"] for made in row["runs"] if "shares" in made]
            table.add_row(
                str(row["num_mixtures"]),
                row["gate_activation"],
                str(rates_of(row)),
                str(row["num_codebooks"]),
                f"{row['float_parameters']:,}",
                f"{row['untrained'][text]:.3f}",
                f"{mean(found):.3f}",
                f"{min(found):.3f} to {max(found):.3f}",
                f"{mean(gated):.2f}" if gated else "",
                f"{mean(differ):.3f}" if differ else "",
                *(
                    f"x{seconds[name] / seconds[f'{name}_of_one_softmax']:.2f}"
                    for name in ("logits", "loss")
                ),
            )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> None:
    """Measure what is missing, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--models", type=Path, default=Path("../shared/models"))
    p.add_argument("--param-reduction", type=float, default=0.99)
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--seed", type=int, default=0, help="of the fit")
    p.add_argument("--quick", action="store_true", help="two rows of two steps, one rate and seed")
    p.add_argument("--work", type=Path, help="folder of what is done; default none is kept")
    p.add_argument("--output", type=Path, required=True, help="JSON; rows in it are kept")
    options = p.parse_args()
    case = load_case("gpt2-novels", options.data, options.models, quick=options.quick)
    case = other_domain(case, options.data, quick=options.quick)
    context = case.calibration.shape[1] - 1
    steps = 2 if options.quick else options.steps
    schedule = Schedule(steps, tokens_per_step=4 * context, batch_size=4, context=context)
    rates, seeds = (RATES[1:2], SEEDS[:1]) if options.quick else (RATES, SEEDS)
    settings: dict[str, Any] = {
        "seed": options.seed,
        "quick": options.quick,
        "model": case.name,
        "param_reduction": options.param_reduction,
        "schedule": vars(schedule),
        "candidate_rates": list(rates),
        "layer_factors": list(LAYER_FACTORS),
        "mixture_factors": list(MIXTURE_FACTORS),
        "seeds": list(seeds),
        "loss_rows": LOSS_ROWS,
        "threads": torch.get_num_threads(),
        "processor": machine()["processor"],
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            work = WorkFolder(options.work or Path(folder), settings)
            results = ResultsFile(options.output, "mixtures", settings=settings)
        except ValueError as error:
            p.error(str(error))
        bench = Bench(case, work, schedule, options.seed)
        reduction = options.param_reduction
        kinds = MIXTURES[:2] if options.quick else MIXTURES
        measure(bench, results, kinds=kinds, reduction=reduction, rates=rates, seeds=seeds)
    show(results.rows)


if __name__ == "__main__":
    main()
