"""Truncation: exact rows for frequent tokens, one constant logit each for all others.

A token's frequency f_v is the mean of the model's own probability for it on calibration text. The F
most frequent tokens keep their rows, in bfloat16. Any other token has the logit log f_v + c in
every context, with c such that on calibration text these tokens together get the probability that
the dense layer gives them on average. Among all constants this is the choice of least divergence
from the dense layer: d KL / d b_v = E[q_v] - E[p_v], p being the dense layer's probabilities and q
the truncated one's, is zero for all v at once.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layer import HALF, Compressed, packed_bytes, through

ROWS = 512


@dataclass(frozen=True)
class Split:
    """How probability is parted between frequent tokens and others.

    Attributes:
        log_mass: (N,) float64, log of the sum of exp(logit) over frequent tokens, by position.
        others: mean probability of the other tokens.
    """

    log_mass: Tensor
    others: float


@torch.no_grad()
def splits(batches: Iterable[Tensor], weight: Tensor, kept: Sequence[Tensor]) -> list[Split]:
    """Part the dense layer's probability, once for every choice of frequent tokens.

    Args:
        batches: hidden states (n, d).
        weight: (V, d).
        kept: (F,) token ids of each choice, each the beginning of the next.
    """
    order = kept[-1]
    rest = torch.ones(len(weight), dtype=torch.bool)
    rest[order] = False
    rows = torch.cat([weight[order], weight[rest]])
    ends = [len(tokens) for tokens in kept]
    masses, shares = [], []
    for hidden in batches:
        for some in hidden.split(ROWS):
            parts = (some @ rows.T).double().tensor_split(ends, 1)
            sums = torch.stack([part.logsumexp(1) for part in parts], 1)  # (n, choices + 1)
            mass = sums.logcumsumexp(1)
            masses.append(mass[:, :-1])
            shares.append(1 - (mass[:, :-1] - mass[:, -1:]).exp())
    mass, share = torch.cat(masses), torch.cat(shares).mean(0)
    return [Split(mass[:, i], float(share[i])) for i in range(len(kept))]


def log_share(split: Split) -> float:
    """Log of the mass of all other tokens that gives them their mean probability.

    The t with E[e^t / (e^t + mass)] = `others`, by bisection: the left side grows with t.

    Raises:
        ValueError: the others have no probability, or all of it.
    """
    if not 0 < split.others < 1:
        raise ValueError(f"The other tokens' mean probability is {split.others}, not in (0, 1).")
    odds = math.log(split.others) - math.log1p(-split.others)
    low, high = odds + float(split.log_mass.min()), odds + float(split.log_mass.max())
    for _ in range(100):
        middle = (low + high) / 2
        if torch.sigmoid(middle - split.log_mass).mean() < split.others:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def frequent_rows(weight: Tensor, frequency: Tensor, kept: Tensor, split: Split) -> Compressed:
    """The truncated layer.

    Bytes: rows, a constant in float16 for every other token, and a bit a token that says which kind
    it is.

    Args:
        weight: (V, d).
        frequency: (V,), positive; any multiple will do.
        kept: (F,) token ids.
        split: of these tokens.
    """
    rows = torch.zeros_like(weight)
    rows[kept] = through(weight[kept], torch.bfloat16)
    others = torch.ones(len(weight), dtype=torch.bool)
    others[kept] = False
    constants = torch.log_softmax(frequency[others].double().log(), 0) + log_share(split)
    bias = torch.zeros(len(weight))
    bias[others] = through(constants, torch.float16)
    vocab_size, size = weight.shape
    counted = HALF * (len(kept) * size + vocab_size - len(kept))
    return Compressed(rows, counted + packed_bytes(vocab_size, 1), bias)
