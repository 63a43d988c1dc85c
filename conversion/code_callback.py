"""Sign codes learnt while Trainer trains the model."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .code_training import DAMPING, EVERY, CodeLearner, CodeMove
from .distillation import MOST_DAMPING

logger = logging.getLogger(__name__)


class LearnCodesCallback(TrainerCallback, ExportableState):
    """A [`CodeLearner`] for Trainer, at work from the beginning of a training to its end.

    A checkpoint holds the codes with the model, and the damping with the callbacks, which
    `restore_callback_states_from_checkpoint=True` reads again. What was summed up since the last
    move is in none: a resumed training begins a new window.

    Args:
        every: optimiser steps between two moves.
        damping: lambda of the first move.

    Attributes:
        damping: of the next move.
        history: all moves so far.

    Example:
        >>> trainer = Trainer(model, arguments, callbacks=[LearnCodesCallback(every=64)])
        ... # doctest: +SKIP
    """

    def __init__(self, *, every: int = EVERY, damping: float = DAMPING):
        self.damping = damping
        self.history: list[CodeMove] = []
        self._every = every
        self._learner: CodeLearner | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback."""
        return {"args": {"every": self._every, "damping": self.damping}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to watch the head.

        Raises:
            ConversionError: this model's codes cannot be learnt; the message says why.
            ValueError: `every` or `damping` is out of its range.
        """
        self._close()  # Trainer begins again where a batch size was too large
        if self.damping > MOST_DAMPING:
            return  # a checkpoint's: no move helped any more
        self._learner = CodeLearner(kwargs["model"], every=self._every, damping=self.damping)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the optimiser step, and move the codes if it is time."""
        if self._learner is None:
            return
        move = self._learner.step()
        self.damping = self._learner.damping
        if move is not None:
            # The learner's own count begins where a resumed training does.
            self.history.append(move._replace(step=state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching the head."""
        if not self.history and state.global_step < self._every:
            logger.warning(
                "The codes were never moved: the training ended after %d steps, before the first "
                "%d; choose a smaller `every`.",
                state.global_step,
                self._every,
            )
        self._close()

    def _close(self) -> None:
        if self._learner is not None:
            self._learner.close()
            self._learner = None
