"""The temperature schedule for Trainer."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..gates import DenseToSparseGate
from .temperature import TemperatureSchedule


class TemperatureCallback(TrainerCallback):
    """Sets the temperature of every dense-to-sparse gate in the model before each step.

    It depends on the step alone, so a resumed training goes on where it was.

    Args:
        schedule: from dense to sparse.

    Example:
        >>> from hf_vqlogits.gaussian_moe import TemperatureSchedule
        >>> callback = TemperatureCallback(TemperatureSchedule(4.0, 0.5))
    """

    def __init__(self, schedule: TemperatureSchedule):
        self.schedule = schedule

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse models for which a schedule makes no sense.

        Raises:
            ValueError: the model has no dense-to-sparse gate, or learns its temperature.
        """
        gates = _gates(kwargs["model"])
        if not gates:
            raise ValueError(
                f"{type(kwargs['model']).__name__} has no dense-to-sparse gate whose temperature "
                "could be scheduled; leave the callback out."
            )
        if any(gate.log_temperature.requires_grad for gate in gates):
            raise ValueError(
                "The temperature of this model is learned (`learn_temperature=True`) and cannot "
                "be scheduled as well; choose one of them."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the temperature of the step that begins."""
        self._set(state.global_step, state, kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set that of the step just made complete, which evaluations and checkpoints then see."""
        self._set(state.global_step, state, kwargs["model"])

    def _set(self, step: int, state: TrainerState, model: Any) -> None:
        temperature = self.schedule(step / max(state.max_steps, 1))
        for gate in _gates(model):
            gate.set_temperature(temperature)


def _gates(model: Any) -> list[DenseToSparseGate]:
    return [module for module in model.modules() if isinstance(module, DenseToSparseGate)]
