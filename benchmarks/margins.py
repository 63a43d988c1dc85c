"""The squared hinge loss beside cross-entropy: the same body and heads, trained equally by each.

    python -m benchmarks.margins --work FOLDER --output benchmarks/results/margins.json

gpt2-novels' body with random quantised heads of one size, which train together on novels, no row
twice: the same rows in the same order. Judged on the evaluation text: the share of next tokens that
are the most likely one, and the perplexity. Margins are no log-probabilities: theirs is that of
softmax(t logits), t fitted to rows kept out, as Platt's scaling does it; that of cross-entropy is
given both ways.

For each loss the learning rate is the best of those given, or of some beyond the last of them, on
rows kept out: once by that share, and once by that perplexity. Where these are two rates, the loss
has a row for each. Every finished training is kept in `--work`, and the same command goes on there.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM
from hf_vqlogits.configuration_vqlogits import OUTPUT_LOSSES
from hf_vqlogits.conversion.families import head_config
from hf_vqlogits.conversion.sizes import choose_size
from hf_vqlogits.conversion.streaming import hidden_states

from .protocol import Case, further_novels, load_case
from .rates import at_edge, best, search
from .record import record, write
from .training import Schedule, fine_tune, training_rows
from .work_folder import WorkFolder

RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
HELD_ROWS = 64
SCALE_ROWS = 16  # of these, to fit t to
TEMPERATURES = 40  # on a logarithmic grid between 1/10 and 100
CRITERIA: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "right tokens": lambda made: -made["right_on_rows_kept_out"],
    "perplexity": lambda made: made["nats_on_rows_kept_out"],
}


def make_model(case: Case, reduction: float, loss: str, seed: int) -> VQLogitsForCausalLM:
    """The case's body with a random head."""
    vocab_size, hidden_size = case.parts.weight.shape
    size = choose_size(
        "signs",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        param_reduction=reduction,
        fine_share=0.0,
    )
    torch.manual_seed(seed)
    config: VQLogitsConfig = head_config(
        case.parts, num_codebooks=size.num_codebooks, output_loss=loss
    )
    model = VQLogitsForCausalLM(config)
    model.model.backbone.load_state_dict(case.parts.backbone.state_dict())
    return model


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


def judge(model: PreTrainedModel, held: Tensor, texts: dict[str, Tensor]) -> dict[str, Any]:
    """Share of right tokens and perplexities on each text, and on the rows kept out.

    Args:
        model: trained.
        held: token ids (rows, context + 1); t is fitted to the first of them.
        texts: likewise, by name.
    """
    grid = [10 ** (-1 + 3 * i / (TEMPERATURES - 1)) for i in range(TEMPERATURES)]
    fitted, _ = _nats_and_hits(model, held[:SCALE_ROWS], grid)
    t = min(grid, key=lambda one: fitted[one])
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
        "factor_at_edge": at_edge(t, grid),
        "texts": judged,
    }


class Bench:
    """Trainings of one case, kept in a folder.

    Args:
        case: the model, and the evaluation text.
        text: token ids (rows, context + 1) to train on; the last `HELD_ROWS` are kept out.
        schedule: of every training.
        reduction: share of the output layer's parameters that a head saves.
        work: where finished trainings are kept.
    """

    def __init__(
        self, case: Case, text: Tensor, schedule: Schedule, reduction: float, work: WorkFolder
    ):
        self.case, self.schedule, self.reduction, self.work = case, schedule, reduction, work
        self.held = text[-HELD_ROWS:]
        self.rows = training_rows(text[:-HELD_ROWS], schedule.context)

    def run(self, loss: str, rate: float, seed: int) -> dict[str, Any]:
        """Train by one loss, and judge it."""

        def make() -> dict[str, Any]:
            model = make_model(self.case, self.reduction, loss, seed)
            losses = fine_tune(model, self.rows, self.schedule, learning_rate=rate, seed=seed)
            made = judge(model, self.held, self.case.evaluation)
            made |= {"learning_rate": rate, "seed": seed}
            made["last_losses"] = mean(losses[-max(1, len(losses) // 10) :])
            right = made["right_on_rows_kept_out"]
            print(f"{loss}, rate {rate:g}, seed {seed}: {right:.2%} right", flush=True)
            return made

        return self.work.result(f"{loss}-rate{rate:g}-seed{seed}", make)

    def measure(self, loss: str, rates: Sequence[float], seeds: Sequence[int]) -> list[Any]:
        """One row of figures for each rate that is the best one by some criterion."""
        first, *others = seeds
        tried: dict[float, dict[str, Any]] = {}
        chosen: dict[float, list[str]] = {}
        for name, criterion in CRITERIA.items():
            found = search(lambda rate: self.run(loss, rate, first), rates, criterion)
            tried |= found
            chosen.setdefault(best(found, criterion), []).append(name)
        return [
            {
                "output_loss": loss,
                "chosen_by": names,
                "rate_at_edge": at_edge(rate, list(tried)),
                "learning_rates": [tried[one] for one in sorted(tried)],
                "runs": [tried[rate], *(self.run(loss, rate, seed) for seed in others)],
            }
            for rate, names in chosen.items()
        ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print means over seeds."""
    for row in rows:
        for text in row["runs"][0]["texts"]:
            figures = [made["texts"][text] for made in row["runs"]]
            right, plain, scaled = (
                mean(one[name] for one in figures)
                for name in ("right", "perplexity", "perplexity_scaled")
            )
            chosen = " and ".join(row["chosen_by"])
            print(
                f"{row['output_loss']}, rate by {chosen}, {text}: {right:.2%} of tokens right, "
                f"perplexity {plain:.1f}, of scaled logits {scaled:.1f}"
            )


def main() -> None:
    """Measure, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--models", type=Path, default=Path("../shared/models"))
    p.add_argument("--param-reduction", type=float, default=0.99)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--quick", action="store_true", help="two steps, one rate and seed, little text")
    p.add_argument("--work", type=Path, help="folder of what is done; default nothing is kept")
    p.add_argument("--output", type=Path, required=True)
    options = p.parse_args()
    case = load_case("gpt2-novels", options.data, options.models, quick=options.quick)
    context = case.calibration.shape[1] - 1
    steps = 2 if options.quick else options.steps
    schedule = Schedule(steps, tokens_per_step=4 * context, batch_size=4, context=context)
    rates, seeds = (RATES[1:2], SEEDS[:1]) if options.quick else (RATES, SEEDS)
    wanted = steps * schedule.tokens_per_step + HELD_ROWS * context
    text = further_novels(case, options.data, wanted + 4 * context)  # files end in mid-row
    settings = {
        "quick": options.quick,
        "model": case.name,
        "param_reduction": options.param_reduction,
        "schedule": vars(schedule),
        "candidate_rates": list(rates),
        "held_rows": HELD_ROWS,
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            work = WorkFolder(options.work or Path(folder), settings)
        except ValueError as error:
            p.error(str(error))
        bench = Bench(case, text, schedule, options.param_reduction, work)
        rows = [row for loss in OUTPUT_LOSSES for row in bench.measure(loss, rates, seeds)]
    result = record("margins", **settings, seeds=list(seeds), rows=rows)
    write(result, options.output)
    show(rows)


if __name__ == "__main__":
    main()
