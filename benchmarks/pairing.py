"""Fine-tuned models against dense ones, in pairs of the same seed.

A run is what `benchmarks.finetuned` keeps of one training: `rate`, `seed`, `held_out_nats` (on
training text that was kept out of the training), and for every text the mean `nats` a token and
the most likely tokens, `choices`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]


def pair(run: Run, dense: Run, untuned: Run) -> dict[str, Any]:
    """One model beside the dense one.

    Args:
        run: of the model.
        dense: of the dense model, trained equally.
        untuned: the dense model without training.

    Returns:
        `factor`, exp of the mean over the texts of log(perplexity / dense perplexity); for every
        text both perplexities, their quotient, and the shares of positions whose most likely token
        is that of the dense model trained equally, and untrained.
    """
    texts = {}
    for text, own in run["texts"].items():
        other = dense["texts"][text]
        texts[text] = {
            "dense_perplexity": _exp(other["nats"]),
            "perplexity": _exp(own["nats"]),
            "factor": _exp(own["nats"] - other["nats"]),
            "agreement_tuned_dense": _same(own["choices"], other["choices"]),
            "agreement_untuned_dense": _same(own["choices"], untuned["texts"][text]["choices"]),
        }
    logs = [own["nats"] - dense["texts"][text]["nats"] for text, own in run["texts"].items()]
    return {"factor": _exp(sum(logs) / len(logs)), "texts": texts}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and greatest value, and their standard deviation (0 of a single one)."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0
    return {"mean": mean, "least": min(values), "most": max(values), "deviation": deviation}


def paired(runs: Mapping[int, Run], dense: Mapping[int, Run], untuned: Run) -> dict[str, Any]:
    """A model's runs beside those of the dense one, seed by seed.

    Args:
        runs: by seed, at the rate chosen.
        dense: likewise, of the dense model.
        untuned: the dense model without training.

    Returns:
        `seeds`: the pair of every seed that both have; `factor` and, for every text, perplexity,
        factor and agreement: mean and spread over these seeds.

    Raises:
        ValueError: they have no seed in common.
    """
    both = [seed for seed in runs if seed in dense]
    if not both:
        raise ValueError(f"No seed in common: {sorted(runs)} and {sorted(dense)}.")
    pairs = {seed: pair(runs[seed], dense[seed], untuned) for seed in both}
    first = pairs[both[0]]["texts"]
    return {
        "factor": spread([found["factor"] for found in pairs.values()]),
        "texts": {
            text: {
                name: spread([found["texts"][text][name] for found in pairs.values()])
                for name in columns
            }
            for text, columns in first.items()
        },
        "seeds": [{"seed": seed, **found} for seed, found in pairs.items()],
    }


def _same(one: Sequence[int], other: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
