"""Distillation: KL to the dense layer on hidden states of the calibration text, body frozen.

Codes are learnt first (`code_learning.py`), then codebook and biases by Adam; those of a mixture,
all of whose floats are trained, stay. The head that was best on positions kept out of the training
is the result.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.ops import eager
from hf_vqlogits.ops.precision import product_dtype

from .code_learning import (
    CHUNK_BYTES,
    Logits,
    levels_of,
    move_codes,
    slope_in_scores,
    slope_of_divergence,
)
from .distillation_state import HEAD, MIXTURE, fingerprint
from .held_out import POSITIONS, rows_of_step, split
from .metric import TokenMetric
from .streaming import KeptStates
from .training import Advance, Distillation, Notify, Training, divergence, relative_rates

# Of the steps, where codes are learnt: of 256 on SmolLM2-135M at 99%, from 0.1261 nats, a half
# made 0.1138, a quarter 0.1139, four fifths (without `WARM_UP`, from 0.1297) 0.1196.
CODE_SHARE = 0.5
WARM_UP = 0.1  # of the steps of Adam, whose first ones are as large as the rate without a reason
CODE_STEPS = 64  # of an iteration that moves codes
# Of the first iteration; doubled whenever the divergence rose. Codewords of index codes are far
# apart: three iterations on k-means of a small GPT-2 took the divergence from 2.13 to 1.97 nats
# with 1, to 2.10 with 4.
DAMPING = {"sign": 4.0, "index": 1.0}
MOST_DAMPING = 32.0


def distill(
    head: VQLogitsHead,
    states: KeptStates,
    *,
    teacher: Logits,
    judge: Logits | None = None,
    steps: int,
    metric: TokenMetric | None = None,
    frozen_bits: int = 0,
    seed: int = 0,
    learning_rate: float | None = None,
    state_file: Path | None = None,
    notify: Notify = lambda made, kl: None,
    advance: Advance = lambda made: None,
) -> Distillation:
    """Train codes, codebook and biases towards the dense layer's distribution.

    Args:
        head: trained in place.
        states: hidden states of the calibration text.
        teacher: the original logits (n, V) of hidden states (n, d).
        judge: the same, exactly, where `teacher` rounds; the positions kept out are judged by it.
        steps: of about a thousand positions each.
        metric: of the fit; without one, or in a mixture, the codes stay.
        frozen_bits: bits of each sign code, the first ones, that stay: those of a smaller head
            inside.
        seed: of the order of the text and of what is kept out.
        learning_rate: of Adam, in units of the codebook's root mean square; falls to zero along
            half a cosine. Default: by the divergence of the start and the number of codebooks.
        state_file: where the run is kept after every check, and found after an interrupt; whoever
            has no further use for it removes it.
        notify: called with the steps made and the KL on the positions kept out, when it was judged.
        advance: called with the steps made, more often.

    Returns:
        The KL divergence before and after, and how it went.

    Raises:
        ConversionError: the text is too short to hold some of it out, or `state_file` is of
            another run.
    """
    training = _HeadTraining(head, states, teacher, judge or teacher, steps, seed, notify, advance)
    options = (steps, seed, learning_rate, frozen_bits)
    key = fingerprint([*head.state_dict().values(), states.blocks], options)
    plain = head.num_mixtures == 1
    training.begin(state_file, HEAD if plain else MIXTURE, key)
    if metric is not None and plain:
        training.learn_codes(metric, steps_for_codes(steps), frozen_bits)
    if learning_rate is None:
        learning_rate = training.rate(head.num_codebooks)
    training.train_codebook(learning_rate)
    return training.finish()


def steps_for_codes(steps: int) -> int:
    """Of so many steps those that move codes: whole moves, as one of less text seldom helps."""
    most = int(CODE_SHARE * steps)
    return most if most < CODE_STEPS else most - most % CODE_STEPS


class _HeadTraining(Training):
    """A run on a head, and the two ways to make a step."""

    def __init__(
        self,
        head: VQLogitsHead,
        states: KeptStates,
        teacher: Logits,
        judge: Logits,
        steps: int,
        seed: int,
        notify: Notify,
        advance: Advance,
    ):
        super().__init__(head, lambda: held_out_kl(head, states(self._held), judge), notify)
        self._head, self._states, self._teacher = head, states, teacher
        self._advance = advance
        self._rows = rows_of_step(states.blocks)
        self._held, self._order = split(states.blocks, steps, seed, versions=states.versions)
        self._damping, self._code_steps_made = DAMPING[head.code_type], 0

    def state(self) -> dict[str, Any]:
        own = {"damping": self._damping, "code_steps_made": self._code_steps_made}
        return super().state() | own

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._damping, self._code_steps_made = state["damping"], state["code_steps_made"]

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
            if not self.judge(last):
                self.take_back()
                self._damping *= 2
            self._code_steps_made = last
            self.keep()

    def train_codebook(self, learning_rate: float) -> None:
        """Adam on codewords, biases and all else that is trained, for all steps that are left."""
        head = self._head
        steps = range(self._code_steps_made, len(self._order) // self._rows)
        levels = None
        if head.code_type == "sign" and head.num_mixtures == 1:
            levels = levels_of(head).to(product_dtype(head.codes.device))

        def backward(step: int) -> None:
            for hidden in self._advancing(step, step + 1):
                self._backward(hidden, levels)

        rates = relative_rates(head.parameters(), learning_rate)
        self.descend(rates, steps, backward, warm_up=WARM_UP)

    def _backward(self, hidden: Tensor, levels: Tensor | None) -> None:
        """Gradients of the mean divergence; levels of the sign codes of a plain head."""
        head = self._head
        if levels is None:
            at_once = max(1, CHUNK_BYTES // (4 * head.out_features * head.num_mixtures))
            for some in hidden.split(at_once):
                (divergence(self._teacher(some), head(some)) / len(hidden)).backward()
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


@torch.no_grad()
def held_out_kl(head: VQLogitsHead, hidden: Any, teacher: Logits) -> float:
    """Mean KL(dense || quantised) in nats over hidden states (n, d), of any number a time."""
    total, positions = 0.0, 0
    for part in hidden:
        for h in part.split(POSITIONS):
            total += float(divergence(teacher(h), head(h)))
            positions += len(h)
    return total / positions
