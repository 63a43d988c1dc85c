"""Tokens drawn from a head's distribution, without the logits of all positions at a time."""

import math
from typing import Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20  # of float32 logits that exist at a time


class Scorer(Protocol):
    """What is sampled from; [`VQLogitsHead`] is one."""

    @property
    def out_features(self) -> int:
        """V."""
        ...

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Logits: (N, d) -> (N, V)."""
        ...

    def topk(self, hidden_states: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits (N, k), and their tokens."""
        ...


@torch.no_grad()
def sample(
    head: Scorer,
    hidden_states: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the next token of every position from softmax(logits / temperature).

    Args:
        head: gives the logits.
        hidden_states: (..., d).
        temperature: positive; below 1 likely tokens become likelier.
        top_k: draw from the so many most likely tokens only; None from all.
        generator: of the draws, on the device of `hidden_states`.

    Returns:
        Tokens, int64 (...).

    Raises:
        ValueError: `temperature` is not positive and finite, or `top_k` is not in 1..V.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"`temperature` must be positive and finite, got {temperature}; `argmax` takes the "
            "most likely token."
        )
    positions = hidden_states.shape[:-1]
    rows = hidden_states.flatten(0, -2) if positions else hidden_states.unsqueeze(0)
    drawn = torch.empty(len(rows), dtype=torch.long, device=rows.device)
    width = head.out_features if top_k is None else top_k
    at_once = max(1, CHUNK_BYTES // (4 * max(1, width)))
    for some, into in zip(rows.split(at_once), drawn.split(at_once), strict=True):
        if top_k is None:
            logits, tokens = head(some), None
        else:
            logits, tokens = head.topk(some, top_k)
        chances = torch.softmax(logits.float() / temperature, -1)
        choice = torch.multinomial(chances, 1, generator=generator)
        into.copy_((choice if tokens is None else tokens.gather(1, choice)).squeeze(1))
    return drawn.view(positions)
