"""Several output layers on the same hidden states: perplexity and agreement in one pass.

The body of a converted model is the original's, so its hidden states are computed once and every
head, dense or quantised, is judged on them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
CHUNK_ROWS = 1024  # 200 MB of float32 logits at V = 50,257


@dataclass(frozen=True)
class HeadScore:
    """How one head predicts a text.

    Attributes:
        nats: mean negative log-likelihood of the next token.
        agreement: share of positions where its most likely token is the dense layer's.
        tokens: positions judged.
    """

    nats: float
    agreement: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exp of `nats`."""
        return math.exp(min(self.nats, 700.0))


@torch.no_grad()
def compare_heads(
    batches: Iterable[tuple[Tensor, Tensor]], dense: Logits, heads: Mapping[str, Logits]
) -> dict[str, HeadScore]:
    """Judge heads on one text.

    Args:
        batches: hidden states (n, d) and next tokens (n,), from `streaming.hidden_states`.
        dense: logits (n, V) of the original layer; scored under the name `"dense"`.
        heads: logits of the others, by name.

    Returns:
        A score for every name.

    Raises:
        ValueError: there are no positions.
    """
    layers = {"dense": dense, **heads}
    nats = dict.fromkeys(layers, 0.0)
    agree = dict.fromkeys(layers, 0)
    tokens = 0
    for hidden, labels in batches:
        tokens += len(labels)
        for h, y in zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
            best: Tensor | None = None
            for name, layer in layers.items():
                logits = layer(h).float()
                nats[name] += float(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
                token = logits.argmax(-1)
                best = token if best is None else best
                agree[name] += int((token == best).sum())
    if not tokens:
        raise ValueError("There are no positions to compare the heads on.")
    return {n: HeadScore(nats[n] / tokens, agree[n] / tokens, tokens) for n in layers}
