"""Distillation of the codebook: KL to the dense layer on streamed hidden states, body frozen."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_vqlogits import VQLogitsHead

from .comparison import Logits
from .errors import ConversionError
from .streaming import hidden_states

POSITIONS = 1024  # of a step
HELD_OUT = 8  # steps' worth of positions on which progress is judged
CHECKS = 10  # how often it is judged on the way


@dataclass(frozen=True)
class Distillation:
    """What a distillation did; KL in nats a position, on positions kept out of the training."""

    steps: int
    kl_before: float
    kl_after: float


def distill(
    head: VQLogitsHead,
    backbone: PreTrainedModel,
    *,
    teacher: Logits,
    blocks: Tensor,
    steps: int,
    seed: int = 0,
    learning_rate: float = 0.01,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Distillation:
    """Train codebook and biases towards the dense layer's distribution; the codes stay.

    The head that was best on held-out positions is kept, so it never becomes worse there.

    Args:
        head: trained in place.
        backbone: frozen.
        teacher: the original logits (n, V) of hidden states (n, d).
        blocks: token ids (rows, context + 1) of the calibration text.
        steps: optimiser steps of about a thousand positions.
        seed: of the order of the text.
        learning_rate: of Adam, in units of the codebook's root mean square; falls to zero along
            half a cosine.
        progress: wraps the iteration over steps.

    Returns:
        The KL divergence before and after.

    Raises:
        ConversionError: the text is too short to hold some of it out.
    """
    context = blocks.shape[1] - 1
    rows = max(1, POSITIONS // context)
    held_rows = min(HELD_OUT * rows, len(blocks) // 5)
    if held_rows < 1 or len(blocks) - held_rows < rows:
        raise ConversionError(
            f"Distillation needs at least {(rows + 1) * (context + 1):,} tokens of calibration "
            f"text, there are {blocks.numel():,}; give more text or `distill_steps` 0."
        )
    held, train = blocks[-held_rows:], blocks[:-held_rows]
    # The text is streamed in another order every time it has been seen once.
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * rows / len(train))
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(epochs)])
    scale = float(head.codebook.detach().float().square().mean().sqrt())
    optimiser = torch.optim.Adam(
        [
            {"params": [head.codebook], "lr": learning_rate * scale},
            {"params": [head.codebook_bias], "lr": learning_rate * _spread(head.codebook_bias)},
        ],
        betas=(0.9, 0.99),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    before = best_kl = held_out_kl(head, backbone, teacher, held)
    best = copy.deepcopy(head.state_dict())
    for step in progress(range(steps)):
        batch = train[order[step * rows : (step + 1) * rows]]
        for hidden, _ in hidden_states(backbone, batch):
            loss = _kl(teacher(hidden), head(hidden)) / len(hidden)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
        if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
            kl = held_out_kl(head, backbone, teacher, held)
            if kl < best_kl:
                best_kl, best = kl, copy.deepcopy(head.state_dict())
    head.load_state_dict(best)
    return Distillation(steps, before, best_kl)


@torch.no_grad()
def held_out_kl(
    head: VQLogitsHead, backbone: PreTrainedModel, teacher: Logits, blocks: Tensor
) -> float:
    """Mean KL(dense || quantised) in nats over the positions of `blocks` (rows, context + 1)."""
    total, positions = 0.0, 0
    for hidden, _ in hidden_states(backbone, blocks):
        for h in hidden.split(POSITIONS):
            total += float(_kl(teacher(h), head(h)))
            positions += len(h)
    return total / positions


def _kl(teacher_logits: Tensor, logits: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(
        torch.log_softmax(logits.float(), -1),
        torch.log_softmax(teacher_logits.float(), -1),
        reduction="sum",
        log_target=True,
    )


def _spread(values: Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt()) or 1.0
