"""Several output layers on the same hidden states: perplexity and agreement in one pass.

Where only the output layer is replaced, the body of a converted model is the original's: its hidden
states are computed once and every head, dense or quantised, is judged on them. A model with a
quantised input embedding has hidden states of its own, and is judged by a pass of its own.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

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
        choices: (tokens,), its most likely token at each.
    """

    nats: float
    agreement: float
    tokens: int
    choices: Tensor = field(repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """Exp of `nats`."""
        return math.exp(min(self.nats, 700.0))


class _Tally:
    """Sums over a text, for one layer."""

    def __init__(self) -> None:
        self.nats = 0.0
        self.choices: list[Tensor] = []

    def add(self, layer: Logits, hidden: Tensor, labels: Tensor) -> None:
        logits = layer(hidden).float()
        self.nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        self.choices.append(logits.argmax(-1))

    def score(self, wanted: Tensor | None = None) -> HeadScore:
        """The score, with agreement with the tokens `wanted`, or with itself."""
        if not self.choices:
            raise ValueError("There are no positions to compare the heads on.")
        choices = torch.cat(self.choices)
        same = 1.0 if wanted is None else float((choices == wanted).double().mean())
        return HeadScore(self.nats / len(choices), same, len(choices), choices)


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
    tallies = {name: _Tally() for name in layers}
    for hidden, labels in batches:
        for h, y in zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
            for name, layer in layers.items():
                tallies[name].add(layer, h, y)
    scores = {"dense": tallies["dense"].score()}
    wanted = scores["dense"].choices
    return scores | {name: tallies[name].score(wanted) for name in heads}


@torch.no_grad()
def judge_model(
    batches: Iterable[tuple[Tensor, Tensor]], head: Logits, wanted: Tensor
) -> HeadScore:
    """Judge a model with hidden states of its own on a text that another was judged on.

    Args:
        batches: its hidden states (n, d) and the next tokens (n,).
        head: its logits (n, V).
        wanted: `choices` of the other's score, which it may agree with.

    Returns:
        Its score.

    Raises:
        ValueError: there are no positions.
    """
    tally = _Tally()
    for hidden, labels in batches:
        for h, y in zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
            tally.add(head, h, y)
    return tally.score(wanted)
