"""The squared hinge loss beside cross-entropy: the same body and heads, trained equally by each.

    python -m benchmarks.margins --output benchmarks/results/margins.json

gpt2-novels' body with random quantised heads of one size, which train together on novels, no row
twice: the same rows in the same order, the best of some learning rates for each loss by the share
of next tokens that are the most likely one, on rows kept out. Judged on the evaluation
text: that share, and the perplexity. Margins are no log-probabilities: theirs is that of
softmax(t logits), t fitted to the rows kept out, as Platt's scaling does it; that of cross-entropy
is given both ways.
"""

import argparse
import math
from collections.abc import Iterable
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
from .record import record, write
from .training import Schedule, fine_tune, training_rows

RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
HELD_ROWS = 16
TEMPERATURES = 40  # on a logarithmic grid between 1/10 and 100


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
        held: token ids (rows, context + 1) that t is fitted to.
        texts: likewise, by name.
    """
    grid = [10 ** (-1 + 3 * i / (TEMPERATURES - 1)) for i in range(TEMPERATURES)]
    of_held, right = _nats_and_hits(model, held, grid)
    best = min(grid, key=lambda t: of_held[t])
    judged = {}
    for text, blocks in texts.items():
        nats, share = _nats_and_hits(model, blocks, (1.0, best))
        judged[text] = {
            "right": share,
            "perplexity": math.exp(min(nats[1.0], 700.0)),
            "perplexity_scaled": math.exp(min(nats[best], 700.0)),
        }
    return {"right_on_rows_kept_out": right, "factor_on_logits": best, "texts": judged}


def measure(
    case: Case,
    text: Tensor,
    schedule: Schedule,
    *,
    reduction: float,
    rates: Iterable[float],
    seeds: Iterable[int],
) -> list[dict[str, Any]]:
    """One row of figures for each loss: the best rate by the first seed, then all seeds."""
    held = text[-HELD_ROWS:]
    rows = training_rows(text[:-HELD_ROWS], schedule.context)
    first, *others = seeds
    found = []
    for loss in OUTPUT_LOSSES:

        def run(rate: float, seed: int, loss: str = loss) -> dict[str, Any]:
            model = make_model(case, reduction, loss, seed)
            losses = fine_tune(model, rows, schedule, learning_rate=rate, seed=seed)
            made = judge(model, held, case.evaluation) | {"learning_rate": rate, "seed": seed}
            made["last_losses"] = mean(losses[-max(1, len(losses) // 10) :])
            print(f"{loss}, rate {rate:g}, seed {seed}: {made['right_on_rows_kept_out']:.1%} right")
            return made

        tried = [run(rate, first) for rate in rates]
        best = max(tried, key=lambda made: made["right_on_rows_kept_out"])
        runs = [best, *(run(best["learning_rate"], seed) for seed in others)]
        found.append({"output_loss": loss, "learning_rates": tried, "runs": runs})
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print means over seeds."""
    for row in rows:
        for text in row["runs"][0]["texts"]:
            figures = [made["texts"][text] for made in row["runs"]]
            right, plain, scaled = (
                mean(one[name] for one in figures)
                for name in ("right", "perplexity", "perplexity_scaled")
            )
            print(
                f"{row['output_loss']}, {text}: {right:.2%} of tokens right, perplexity "
                f"{plain:.1f}, of scaled logits {scaled:.1f}"
            )


def main() -> None:
    """Measure, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--models", type=Path, default=Path("../shared/models"))
    p.add_argument("--param-reduction", type=float, default=0.99)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--quick", action="store_true", help="two steps, one rate and seed, little text")
    p.add_argument("--output", type=Path, required=True)
    options = p.parse_args()
    case = load_case("gpt2-novels", options.data, options.models, quick=options.quick)
    context = case.calibration.shape[1] - 1
    steps = 2 if options.quick else options.steps
    schedule = Schedule(steps, tokens_per_step=4 * context, batch_size=4, context=context)
    rates, seeds = (RATES[1:2], SEEDS[:1]) if options.quick else (RATES, SEEDS)
    wanted = steps * schedule.tokens_per_step + HELD_ROWS * context
    text = further_novels(case, options.data, wanted + 4 * context)  # files end in mid-row
    rows = measure(
        case, text, schedule, reduction=options.param_reduction, rates=rates, seeds=seeds
    )
    result = record(
        "margins",
        quick=options.quick,
        model=case.name,
        param_reduction=options.param_reduction,
        schedule=vars(schedule),
        seeds=list(seeds),
        rows=rows,
    )
    write(result, options.output)
    show(rows)


if __name__ == "__main__":
    main()
