"""Distillation: KL to the dense layer on hidden states of the calibration text, body frozen.

Sign codes are learnt first (`code_learning.py`), then codebook and biases by Adam; index codes
stay. The head that was best on positions kept out of the training is the result.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.ops import eager

from .code_learning import (
    Logits,
    levels_of,
    move_codes,
    slope_in_scores,
    slope_of_divergence,
)
from .distillation_state import fingerprint, load_state, save_state
from .errors import ConversionError
from .metric import TokenMetric
from .precision import product_dtype
from .streaming import KeptStates

POSITIONS = 1024  # of a step
HELD_OUT = 8  # steps' worth of positions on which progress is judged
CODE_SHARE = 0.8  # of the steps, where codes are learnt
CODE_STEPS = 64  # of an iteration that moves codes
CODEBOOK_CHECKS = 5  # how often the training of the codebook is judged
# Adam moves a token's vector by up to the rate times the square root of the number of codebooks,
# and that should be a small part of its error, which is as the square root of the divergence: on
# SmolLM2-135M at 98% (R = 981) a rate of 0.003 took the divergence from 0.024 to 0.041 nats in ten
# steps, where at 99% it took it from 0.111 to 0.108 in 64. By this rule it is 0.0005 and 0.0016.
RATE = 0.1
MOST_RATE = 0.01
DAMPING = 4.0  # of the first iteration; doubled whenever the divergence rose
MOST_DAMPING = 32.0
DIVERGED = 0.1  # nats above the divergence of the start

Notify = Callable[[int, float], None]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Distillation:
    """What a distillation did; KL in nats a position, on positions kept out of the training.

    Attributes:
        steps: that were made, of about a thousand positions each.
        kl_before: at the start.
        kl_after: of the head that was kept.
        history: (steps made, KL) whenever it was judged.
        stopped: why the training ended early, or None.
    """

    steps: int
    kl_before: float
    kl_after: float
    history: list[tuple[int, float]] = field(default_factory=list)
    stopped: str | None = None


def distill(
    head: VQLogitsHead,
    states: KeptStates,
    *,
    teacher: Logits,
    steps: int,
    metric: TokenMetric | None = None,
    frozen_bits: int = 0,
    seed: int = 0,
    learning_rate: float | None = None,
    state_file: Path | None = None,
    keep_state: bool = False,
    notify: Notify = lambda made, kl: None,
    advance: Advance = lambda made: None,
) -> Distillation:
    """Train codes, codebook and biases towards the dense layer's distribution.

    Args:
        head: trained in place.
        states: hidden states of the calibration text.
        teacher: the original logits (n, V) of hidden states (n, d).
        steps: of about a thousand positions each.
        metric: of the fit; without one, or with index codes, the codes stay.
        frozen_bits: bits of each code, the first ones, that stay: those of a smaller head inside.
        seed: of the order of the text and of what is kept out.
        learning_rate: of Adam, in units of the codebook's root mean square; falls to zero along
            half a cosine. Default: by the divergence of the start and the number of codebooks.
        state_file: where the run is kept after every check, and found after an interrupt; removed
            at the end.
        keep_state: leave `state_file` there at the end, so that the same call need not train again.
        notify: called with the steps made and the KL on the positions kept out, when it was judged.
        advance: called with the steps made, more often.

    Returns:
        The KL divergence before and after, and how it went.

    Raises:
        ConversionError: the text is too short to hold some of it out, or `state_file` is of
            another run.
    """
    training = _Training(head, states, teacher, steps, seed, notify, advance)
    key = fingerprint(head, states.blocks, steps, seed, learning_rate, frozen_bits)
    kept = None if state_file is None else load_state(state_file, key)
    if kept is None:
        training.start()
    else:
        training.restore(kept)
    training.keep = lambda: (
        None if state_file is None else save_state(state_file, key, training.state())
    )
    if metric is not None and head.code_type == "sign":
        training.learn_codes(metric, int(CODE_SHARE * steps), frozen_bits)
    if learning_rate is None:
        first = training.history[0][1]
        learning_rate = min(MOST_RATE, RATE * math.sqrt(max(first, 0.0) / head.num_codebooks))
    training.train_codebook(learning_rate)
    head.load_state_dict(training.best)
    if state_file is not None and not keep_state:
        state_file.unlink(missing_ok=True)
    history = training.history
    return Distillation(history[-1][0], history[0][1], training.best_kl, history, training.stopped)


class _Training:
    """A run: what changes in it, and the two ways to make a step."""

    def __init__(
        self,
        head: VQLogitsHead,
        states: KeptStates,
        teacher: Logits,
        steps: int,
        seed: int,
        notify: Notify,
        advance: Advance,
    ):
        self._head, self._states, self._teacher = head, states, teacher
        self._notify, self._advance = notify, advance
        self._rows = _rows_of_step(states.blocks)
        self._held, self._order = _split(states, steps, seed)
        self.keep: Callable[[], None] = lambda: None
        self.history: list[tuple[int, float]] = []
        self.best_kl, self.best = math.inf, copy.deepcopy(head.state_dict())
        self.stopped: str | None = None
        self._damping, self._code_steps_made = DAMPING, 0
        self._adam: dict[str, Any] | None = None

    def start(self) -> None:
        """Judge the head as it is."""
        self._judge(0)

    def state(self) -> dict[str, Any]:
        """All that [`restore`] needs."""
        return {
            "head": self._head.state_dict(),
            "history": self.history,
            "best_kl": self.best_kl,
            "best": self.best,
            "stopped": self.stopped,
            "damping": self._damping,
            "code_steps_made": self._code_steps_made,
            "adam": self._adam,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where [`state`] was taken."""
        self._head.load_state_dict(state["head"])
        self.history, self.best_kl = state["history"], state["best_kl"]
        self.best, self.stopped = state["best"], state["stopped"]
        self._damping, self._code_steps_made = state["damping"], state["code_steps_made"]
        self._adam = state["adam"]
        self._notify(*self.history[-1])

    def learn_codes(self, metric: TokenMetric, steps: int, frozen_bits: int) -> None:
        """Majorise-minimise; codes that made it worse are taken back, and the next move less.

        Args:
            metric: of the fit.
            steps: at most; fewer where no move however small helps.
            frozen_bits: bits of each code, the first ones, that stay.
        """
        head = self._head
        while self._code_steps_made < steps and self._damping <= MOST_DAMPING:
            first, last = self._code_steps_made, min(self._code_steps_made + CODE_STEPS, steps)
            hidden = self._advancing(first, last)
            slope = slope_of_divergence(head, metric, self._teacher, hidden)
            move_codes(head, metric, slope, self._damping, frozen_bits)
            if not self._judge(last):
                head.load_state_dict(self.best)
                self._damping *= 2
            self._code_steps_made = last
            self.keep()

    def train_codebook(self, learning_rate: float) -> None:
        """Adam on codewords and biases, for all steps that are left."""
        head, first = self._head, self._code_steps_made
        steps = len(self._order) // self._rows - first
        groups = [
            {"params": [tensor], "lr": learning_rate * _spread(tensor)}
            for tensor in (head.codebook, head.codebook_bias)
        ]
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
        levels = None
        if head.code_type == "sign":
            levels = levels_of(head).to(product_dtype(head.codes.device))
        made = 0
        if self._adam is not None:
            made = self._adam["made"]
            optimiser.load_state_dict(self._adam["optimiser"])
            schedule.load_state_dict(self._adam["schedule"])
        for step in range(made, steps if self.stopped is None else made):
            for hidden in self._advancing(first + step, first + step + 1):
                optimiser.zero_grad()
                self._backward(hidden, levels)
                optimiser.step()
            schedule.step()
            if (step + 1) % max(1, steps // CODEBOOK_CHECKS) == 0 or step + 1 == steps:
                better = self._judge(first + step + 1)
                start = self.history[0][1]
                if not better and not self.history[-1][1] <= start + DIVERGED:
                    self.stopped = (
                        f"the divergence rose from {start:.3g} to {self.history[-1][1]:.3g} nats "
                        f"in {first + step + 1} steps"
                    )
                    break
                self._adam = {
                    "made": step + 1,
                    "optimiser": optimiser.state_dict(),
                    "schedule": schedule.state_dict(),
                }
                self.keep()

    def _backward(self, hidden: Tensor, levels: Tensor | None) -> None:
        """Gradients of the mean divergence in codewords and biases; levels of sign codes."""
        head = self._head
        if levels is None:
            (divergence(self._teacher(hidden), head(hidden)) / len(hidden)).backward()
            return
        scores = eager.scores(
            hidden, head.codebook.float(), head.codebook_bias.float(), scale=head.score_scale
        )
        slope = slope_in_scores(head, levels, scores.detach(), self._teacher, hidden)
        scores.backward(slope / len(hidden))

    def _advancing(self, first: int, last: int) -> Iterator[Tensor]:
        """Hidden states of steps, telling how far they are."""
        positions = 0
        for hidden in self._states(self._order[first * self._rows : last * self._rows]):
            yield hidden
            positions += len(hidden)
            self._advance(min(last, first + positions // POSITIONS))

    def _judge(self, made: int) -> bool:
        """Measure the head on the positions kept out; whether it is the best so far."""
        kl = held_out_kl(self._head, self._states(self._held), self._teacher)
        self.history.append((made, kl))
        self._notify(made, kl)
        if not kl < self.best_kl:
            return False
        self.best_kl, self.best = kl, copy.deepcopy(self._head.state_dict())
        return True


@torch.no_grad()
def held_out_kl(head: VQLogitsHead, hidden: Any, teacher: Logits) -> float:
    """Mean KL(dense || quantised) in nats over hidden states (n, d), of any number a time."""
    total, positions = 0.0, 0
    for part in hidden:
        for h in part.split(POSITIONS):
            total += float(divergence(teacher(h), head(h)))
            positions += len(h)
    return total / positions


def divergence(teacher_logits: Tensor, logits: Tensor) -> Tensor:
    """Sum over positions of KL(dense || quantised) in nats, of logits (n, V)."""
    return torch.nn.functional.kl_div(
        torch.log_softmax(logits.float(), -1),
        torch.log_softmax(teacher_logits.float(), -1),
        reduction="sum",
        log_target=True,
    )


def long_enough(blocks: Tensor) -> bool:
    """Whether rows of token ids (rows, context + 1) can be split into text to train on and not."""
    return len(blocks) >= _least_rows(blocks)


def check_length(blocks: Tensor) -> None:
    """Refuse text that is not [`long_enough`].

    Raises:
        ConversionError: says how many tokens are needed.
    """
    if not long_enough(blocks):
        raise ConversionError(
            f"Distillation needs at least {_least_rows(blocks) * blocks.shape[1]:,} tokens of "
            f"calibration text, there are {blocks.numel():,}; give more text or "
            "`distill_steps` 0."
        )


def _least_rows(blocks: Tensor) -> int:
    """So many that a fifth, rounded down, is a row or more, and the others are a step's or more."""
    rows = _rows_of_step(blocks)
    return max(5, rows + (rows - 1) // 4)


def _rows_of_step(blocks: Tensor) -> int:
    return max(1, POSITIONS // (blocks.shape[1] - 1))


def _kept_out(blocks: Tensor) -> int:
    return min(HELD_OUT * _rows_of_step(blocks), len(blocks) // 5)


def _split(states: KeptStates, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows kept out, and those of all steps: in another order every time all have been seen.

    What is kept out is text as it was, and no version of it is trained on.
    """
    text = states.blocks[: len(states.blocks) // states.versions]
    check_length(text)
    rows, held = _rows_of_step(text), _kept_out(text)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(text), generator=generator)
    train = torch.cat([shuffled[held:] + i * len(text) for i in range(states.versions)])
    epochs = math.ceil(steps * rows / len(train))
    order = [train[torch.randperm(len(train), generator=generator)] for _ in range(epochs)]
    return shuffled[:held], torch.cat(order)[: steps * rows]


def _spread(values: Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt()) or 1.0
