"""What trainings towards the original model have in common.

Adam on some floats; the divergence is judged now and then on text kept out, the best state is the
result, a training that diverges ends early, and one that was interrupted can go on.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from .distillation_state import load_state, save_state

CHECKS = 5  # how often a run of Adam is judged
# Adam moves a token's vector by up to the rate times the square root of the number of codebooks,
# and that should be a small part of its error, which is as the square root of the divergence: on
# SmolLM2-135M at 98% (R = 981) a rate of 0.003 took the divergence from 0.024 to 0.041 nats in ten
# steps, where at 99% it took it from 0.111 to 0.108 in 64. By this rule it is 0.0005 and 0.0016.
RATE = 0.1
MOST_RATE = 0.01
# Nats above the divergence of the start, or so many times it where that is less and no mere noise.
DIVERGED, DIVERGED_TIMES, NOISE = 0.1, 3.0, 1e-3

Notify = Callable[[int, float], None]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Distillation:
    """What a distillation did; KL in nats a position, on positions kept out of the training.

    Attributes:
        steps: that were made, of about a thousand positions each.
        kl_before: at the start.
        kl_after: of what was kept.
        history: (steps made, KL) whenever it was judged.
        stopped: why the training ended early, or None.
    """

    steps: int
    kl_before: float
    kl_after: float
    history: list[tuple[int, float]] = field(default_factory=list)
    stopped: str | None = None


class Training:
    """A run: what was judged, what was best, and the state to go on from.

    Attributes:
        history: (steps made, KL) whenever it was judged.
        best_kl: the lowest of these.
        best: the state of the module there.
        stopped: why the training ended early, or None.
        keep: called whenever [`state`] is one to go on from.

    Args:
        module: trained in place.
        measure: its mean KL divergence on positions kept out.
        notify: called with the steps made and the KL, when it was judged.
    """

    def __init__(self, module: nn.Module, measure: Callable[[], float], notify: Notify):
        self._module, self._measure, self._notify = module, measure, notify
        self.history: list[tuple[int, float]] = []
        self.best_kl, self.best = math.inf, copy.deepcopy(module.state_dict())
        self.stopped: str | None = None
        self.keep: Callable[[], None] = lambda: None
        self._adam: dict[str, Any] | None = None

    def judge(self, made: int) -> bool:
        """Measure the module after so many steps; whether it is the best so far."""
        kl = self._measure()
        self.history.append((made, kl))
        self._notify(made, kl)
        if not kl < self.best_kl:
            return False
        self.best_kl, self.best = kl, copy.deepcopy(self._module.state_dict())
        return True

    def take_back(self) -> None:
        """Make the module the best one again."""
        self._module.load_state_dict(self.best)

    def begin(self, file: Path | None, stage: str, key: str) -> None:
        """Judge the module as it is, or go on where an interrupted run was.

        Args:
            file: where the run is kept after every check; None keeps nothing.
            stage: of the distillation.
            key: of [`fingerprint`].

        Raises:
            ConversionError: `file` is of another run.
        """
        kept = None if file is None else load_state(file, stage, key)
        if kept is None:
            self.judge(0)
        else:
            self.restore(kept)
        if file is not None:
            self.keep = lambda: save_state(file, stage, key, self.state())

    def state(self) -> dict[str, Any]:
        """All that [`restore`] needs."""
        return {
            "module": self._module.state_dict(),
            "history": self.history,
            "best_kl": self.best_kl,
            "best": self.best,
            "stopped": self.stopped,
            "adam": self._adam,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where [`state`] was taken."""
        self._module.load_state_dict(state["module"])
        self.history, self.best_kl = state["history"], state["best_kl"]
        self.best, self.stopped = state["best"], state["stopped"]
        self._adam = state["adam"]
        self._notify(*self.history[-1])

    def rate(self, num_codebooks: int) -> float:
        """Learning rate by the divergence of the start; see `RATE`."""
        return min(MOST_RATE, RATE * math.sqrt(max(self.history[0][1], 0.0) / num_codebooks))

    def descend(
        self,
        rates: Mapping[nn.Parameter, float],
        steps: range,
        backward: Callable[[int], None],
        *,
        warm_up: float = 0.0,
    ) -> None:
        """Adam, for those of the steps that have not been made.

        Args:
            rates: learning rate of each parameter; they fall to zero along half a cosine.
            steps: counted as in `history`.
            backward: `backward(step)` adds a step's gradient to that of the parameters.
            warm_up: share of the steps in which the rates rise.
        """
        groups = [{"params": [p], "lr": rate} for p, rate in rates.items()]
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
        rising = math.ceil(warm_up * len(steps))
        schedule = get_cosine_schedule_with_warmup(optimiser, rising, max(1, len(steps)))
        made = 0
        if self._adam is not None:
            made = self._adam["made"]
            optimiser.load_state_dict(self._adam["optimiser"])
            schedule.load_state_dict(self._adam["schedule"])
        for step in steps[made:] if self.stopped is None else ():
            optimiser.zero_grad()
            backward(step)
            optimiser.step()
            schedule.step()
            made += 1
            if made % max(1, len(steps) // CHECKS) == 0 or made == len(steps):
                if not self.judge(step + 1) and self._diverged():
                    break
                self._adam = {
                    "made": made,
                    "optimiser": optimiser.state_dict(),
                    "schedule": schedule.state_dict(),
                }
                self.keep()
        optimiser.zero_grad()

    def finish(self) -> Distillation:
        """Take the best state, and tell how it went."""
        self.take_back()
        history = self.history
        return Distillation(history[-1][0], history[0][1], self.best_kl, history, self.stopped)

    def _diverged(self) -> bool:
        """Whether the divergence is far above that of the start, which `stopped` then says."""
        (_, start), (made, kl) = self.history[0], self.history[-1]
        if kl <= start + min(DIVERGED, max((DIVERGED_TIMES - 1) * start, NOISE)):
            return False
        self.stopped = f"the divergence rose from {start:.3g} to {kl:.3g} nats in {made} steps"
        return True


def divergence(teacher_logits: Tensor, logits: Tensor) -> Tensor:
    """Sum over positions of KL(dense || quantised) in nats, of logits (n, V)."""
    return nn.functional.kl_div(
        torch.log_softmax(logits.float(), -1),
        torch.log_softmax(teacher_logits.float(), -1),
        reduction="sum",
        log_target=True,
    )


def relative_rates(
    parameters: Iterable[nn.Parameter], learning_rate: float
) -> dict[nn.Parameter, float]:
    """Learning rates of parameters, from one in units of each one's root mean square."""
    return {p: learning_rate * spread(p) for p in parameters}


def spread(values: Tensor) -> float:
    """Root mean square, or 1 where that is zero."""
    return float(values.detach().float().square().mean().sqrt()) or 1.0
