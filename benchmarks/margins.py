"""The squared hinge loss beside cross-entropy: a converted model, fine-tuned equally by each.

    python -m benchmarks.margins --work FOLDER --output benchmarks/results/margins.json

A head of sign codes is fitted to gpt2-novels on WikiText-2, which the model has not seen. One of
its codewords is shared by all tokens: margins are near -1 for nearly all of them, and fitted codes
can learn no number that all have in common. For the margins the logits are then scaled and shifted
by two numbers, those of least loss, so that both trainings begin with the same most likely tokens.
Then the whole model trains on that text, no row twice: the same rows in the same order. Judged on
other text, before and after: the share of next tokens that are the most likely one, and the
perplexity. Margins are no log-probabilities: theirs is that of softmax(t logits), t fitted to rows
kept out, as Platt's scaling does it; that of cross-entropy is given both ways.

For each loss the learning rate is the best of those given, or of some beyond the last of them, on
rows kept out: once by that share, and once by that perplexity. Where these are two rates, the loss
has a row for each. Margins are smaller numbers than logits, and so are the codewords that make
them; the head learns at one of `HEAD_FACTORS` times the rate of the body, the better one at the
rate in the middle. Every finished training is kept in `--work`, and the same command goes on there.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.configuration_vqlogits import OUTPUT_LOSSES
from hf_vqlogits.conversion.environment import machine
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.signs import SignFit
from hf_vqlogits.conversion.sizes import choose_size
from hf_vqlogits.conversion.streaming import hidden_states
from hf_vqlogits.gru_svm.squared_hinge import squared_hinge
from hf_vqlogits.ops import pack_signs, unpack_signs

from .calibrated import calibrated
from .models import fit_head, kept_head, quantised_model
from .protocol import Case, load_case, other_domain
from .rates import at_edge, best, search
from .record import record, write
from .training import Schedule, fine_tune, training_rows
from .trainings import hold_out
from .work_folder import WorkFolder

RATES = (3e-4, 1e-3, 3e-3)
HEAD_FACTORS = (1.0, 0.1)
SEEDS = (0, 1, 2)
SCALE_ROWS = 16  # of those kept out, to fit t to
START_TOKENS = 512  # of the text to train on, to scale and shift the logits for margins by
# Of t: a logarithmic grid from 0.1 to some 8,000, for margins that have hardly left -1, and one
# around the best of it.
LEAST_FACTOR, STEP, COARSE, FINE = 0.1, 10 ** (3 / 19), 32, 20
FIGURES = {"right": ".2%", "perplexity": ".1f", "perplexity_scaled": ".1f"}
CRITERIA: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "right tokens": lambda made: -made["right_on_rows_kept_out"],
    "perplexity": lambda made: made["nats_on_rows_kept_out"],
}


def with_a_shared_codeword(head: VQLogitsHead) -> SignFit:
    """A head of one codeword more, a zero one that all tokens have.

    Args:
        head: fitted, of one sign code a token.
    """
    signs = unpack_signs(head.codes, head.num_codebooks)
    codebook, bias = (head.score_scale * t.detach() for t in (head.codebook, head.codebook_bias))
    return SignFit(
        pack_signs(torch.cat([signs.new_ones(len(signs), 1), signs], dim=1)),
        torch.cat([torch.zeros_like(codebook[:1]), codebook]),
        torch.cat([torch.zeros_like(bias[:1]), bias]),
    )


def to_margins(head: VQLogitsHead, hidden: Tensor, labels: Tensor) -> dict[str, float]:
    """Scale and shift all logits by the two numbers of least squared hinge loss, in place.

    Args:
        head: of [`with_a_shared_codeword`].
        hidden: (n, d).
        labels: (n,).

    Returns:
        The numbers, `scale` and `shift`.
    """
    with torch.no_grad():
        logits = head(hidden).float()
    numbers = torch.tensor([0.0, -1.0], requires_grad=True)
    optimiser = torch.optim.LBFGS([numbers], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = squared_hinge(numbers[0] * logits + numbers[1], labels) / len(labels)
        value.backward()
        return value

    optimiser.step(loss)
    scale, shift = numbers.tolist()
    with torch.no_grad():
        head.codebook.mul_(scale)
        head.codebook_bias.mul_(scale)
        head.codebook_bias[0] += shift / head.score_scale
    return {"scale": scale, "shift": shift}


@torch.no_grad()
def _nats_and_hits(
    model: PreTrainedModel, blocks: Tensor, temperatures: Iterable[float]
) -> tuple[dict[float, float], float]:
    """Nats a token by factor on the logits, and the share of tokens that are the most likely."""
    body: Any = model.base_model
    head = model.get_output_embeddings()
    nats: dict[float, list[float]] = {t: [] for t in temperatures}
    hits, count = 0, 0
    for hidden, labels in hidden_states(body, blocks):
        for some, wanted in zip(hidden.split(256), labels.split(256), strict=True):
            logits = head(some).float()
            hits += int((logits.argmax(-1) == wanted).sum())
            count += len(wanted)
            for t, found in nats.items():
                loss = torch.nn.functional.cross_entropy(t * logits, wanted, reduction="sum")
                found.append(float(loss))
    return {t: sum(found) / count for t, found in nats.items()}, hits / count


def _best_factor(model: PreTrainedModel, blocks: Tensor, grid: Sequence[float]) -> float:
    nats, _ = _nats_and_hits(model, blocks, grid)
    return min(grid, key=lambda one: nats[one])


def judge(model: PreTrainedModel, held: Tensor, texts: dict[str, Tensor]) -> dict[str, Any]:
    """Share of right tokens and perplexities on each text, and on the rows kept out.

    Args:
        model: trained.
        held: token ids (rows, context + 1); t is fitted to the first of them.
        texts: likewise, by name.
    """
    grid = [LEAST_FACTOR * STEP**i for i in range(COARSE)]
    coarse = _best_factor(model, held[:SCALE_ROWS], grid)
    finer = [coarse * STEP ** (2 * i / (FINE - 1) - 1) for i in range(FINE)]
    t = _best_factor(model, held[:SCALE_ROWS], finer)
    of_held, right = _nats_and_hits(model, held, (t,))
    judged = {}
    for text, blocks in texts.items():
        nats, share = _nats_and_hits(model, blocks, (1.0, t))
        judged[text] = {
            "right": share,
            "perplexity": math.exp(min(nats[1.0], 700.0)),
            "perplexity_scaled": math.exp(min(nats[t], 700.0)),
        }
    return {
        "right_on_rows_kept_out": right,
        "nats_on_rows_kept_out": of_held[t],
        "factor_on_logits": t,
        "factor_at_edge": at_edge(coarse, grid),
        "texts": judged,
    }


class Bench:
    """Trainings of one case, kept in a folder.

    Args:
        case: the head is fitted to its calibration text, and trained on it; a twentieth of its
            rows is kept out of both.
        schedule: of every training.
        reduction: share of the output layer's parameters that a head saves.
        work: where the statistics of the calibration text, the head and trainings are kept.
        seed: of the fit.
    """

    def __init__(
        self, case: Case, schedule: Schedule, reduction: float, work: WorkFolder, seed: int
    ):
        self.case, self.schedule, self.work = case, schedule, work
        train, self.held = hold_out(case.calibration)
        self.rows = training_rows(train, schedule.context)
        vocab_size, hidden_size = case.parts.weight.shape
        self.size = choose_size(
            "signs",
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            param_reduction=reduction,
            fine_share=0.0,
        )
        corpus = replace(case.corpus(), calibration=train)
        self.quantiser = Quantiser(case.parts, corpus, seed, show_progress=True)
        self.head = kept_head(work, "head", self.quantiser, self.size, self._fitted)
        blocks = train[: -(-START_TOKENS // schedule.context)]
        parts = list(hidden_states(case.parts.backbone, blocks))
        self.start = tuple(torch.cat(some)[:START_TOKENS] for some in zip(*parts, strict=True))

    def _fitted(self) -> VQLogitsHead:
        statistics, _ = calibrated(self.case, self.quantiser, self.work)
        fewer = replace(self.size, num_codebooks=self.size.num_codebooks - 1)
        fitted = with_a_shared_codeword(fit_head(self.quantiser, "signs", fewer, statistics))
        return self.quantiser.head_of(self.size, statistics, fitted)

    def model(self, loss: str) -> tuple[Any, dict[str, float]]:
        """The converted model, as its training begins, and how its logits were changed for it."""
        model: Any = quantised_model(self.quantiser, self.size, self.head)
        model.config.output_loss = loss
        changed = {}
        if loss == "squared_hinge":
            changed = to_margins(model.lm_head, *self.start)
        return model.eval(), changed

    def untrained(self, loss: str) -> dict[str, Any]:
        """How the converted model is judged before the training."""

        def make() -> dict[str, Any]:
            model, changed = self.model(loss)
            return judge(model, self.held, self.case.evaluation) | changed

        return self.work.result(f"{loss}-untrained", make)

    def run(self, loss: str, rate: float, factor: float, seed: int) -> dict[str, Any]:
        """Train by one loss, and judge it."""

        def make() -> dict[str, Any]:
            model, _ = self.model(loss)
            schedule = replace(self.schedule, head_factor=factor)
            losses = fine_tune(model, self.rows, schedule, learning_rate=rate, seed=seed)
            made = judge(model, self.held, self.case.evaluation)
            made |= {"learning_rate": rate, "head_factor": factor, "seed": seed}
            made["last_losses"] = mean(losses[-max(1, len(losses) // 10) :])
            right = made["right_on_rows_kept_out"]
            told = f"{loss}, rate {rate:g} (head x{factor:g}), seed {seed}"
            print(f"{told}: {right:.2%} right", flush=True)
            return made

        return self.work.result(f"{loss}-rate{rate:g}-factor{factor:g}-seed{seed}", make)

    def measure(self, loss: str, rates: Sequence[float], seeds: Sequence[int]) -> list[Any]:
        """One row of figures for each rate that is the best one by some criterion."""
        first, *others = seeds
        middle = sorted(rates)[len(rates) // 2]
        by_factor = {factor: self.run(loss, middle, factor, first) for factor in HEAD_FACTORS}
        tried = {(middle, factor): made for factor, made in by_factor.items()}
        chosen: dict[tuple[float, float], list[str]] = {}
        for name, criterion in CRITERIA.items():
            factor = best(by_factor, criterion)
            found = search(partial(self.run, loss, factor=factor, seed=first), rates, criterion)
            tried |= {(rate, factor): made for rate, made in found.items()}
            chosen.setdefault((best(found, criterion), factor), []).append(name)
        return [
            {
                "output_loss": loss,
                "chosen_by": names,
                "rate_at_edge": at_edge(rate, [one for one, of in tried if of == factor]),
                "untrained": self.untrained(loss),
                "tried": [tried[one] for one in sorted(tried)],
                "runs": [tried[rate, factor], *(self.run(loss, rate, factor, s) for s in others)],
            }
            for (rate, factor), names in chosen.items()
        ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print means over seeds."""
    for row in rows:
        for text, before in row["untrained"]["texts"].items():
            figures = [made["texts"][text] for made in row["runs"]]
            right, plain, scaled = (
                f"{before[name]:{form}} to {mean(one[name] for one in figures):{form}}"
                for name, form in FIGURES.items()
            )
            chosen = " and ".join(row["chosen_by"])
            print(
                f"{row['output_loss']}, rate by {chosen}, {text}: right tokens {right}, "
                f"perplexity {plain}, of scaled logits {scaled}"
            )


def main() -> None:
    """Measure, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--models", type=Path, default=Path("../shared/models"))
    p.add_argument("--param-reduction", type=float, default=0.99)
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--seed", type=int, default=0, help="of the fit")
    p.add_argument("--quick", action="store_true", help="two steps, one rate and seed, little text")
    p.add_argument("--work", type=Path, help="folder of what is done; default nothing is kept")
    p.add_argument("--output", type=Path, required=True)
    options = p.parse_args()
    case = load_case("gpt2-novels", options.data, options.models, quick=options.quick)
    case = other_domain(case, options.data, quick=options.quick)
    context = case.calibration.shape[1] - 1
    steps = 2 if options.quick else options.steps
    schedule = Schedule(steps, tokens_per_step=4 * context, batch_size=4, context=context)
    rates, seeds = (RATES[1:2], SEEDS[:1]) if options.quick else (RATES, SEEDS)
    settings = {
        "seed": options.seed,
        "quick": options.quick,
        "model": case.name,
        "param_reduction": options.param_reduction,
        "schedule": vars(schedule),
        "candidate_rates": list(rates),
        "head_factors": list(HEAD_FACTORS),
        "scale_rows": SCALE_ROWS,
        "start_tokens": START_TOKENS,
        "threads": torch.get_num_threads(),
        "processor": machine()["processor"],
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            work = WorkFolder(options.work or Path(folder), settings)
        except ValueError as error:
            p.error(str(error))
        reduction = options.param_reduction
        bench = Bench(case, schedule, reduction, work, options.seed)
        rows = [row for loss in OUTPUT_LOSSES for row in bench.measure(loss, rates, seeds)]
    result = record("margins", **settings, seeds=list(seeds), rows=rows)
    write(result, options.output)
    show(rows)


if __name__ == "__main__":
    main()
