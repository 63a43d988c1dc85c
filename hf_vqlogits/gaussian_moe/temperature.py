"""The temperature's way from dense to sparse."""

from dataclasses import dataclass

from ..gates import check_temperature


@dataclass(frozen=True)
class TemperatureSchedule:
    """A geometric fall of the temperature, after which it stays.

    Every step multiplies it by the same factor, so that scores grow relative to it evenly.

    Args:
        start: tau at the beginning, high for dense gates.
        end: tau at the end, low for sparse gates.
        share: part of the training over which it falls, above 0 and up to 1.

    Raises:
        ValueError: a temperature is not positive and finite, `end` is above `start`, or `share` is
            out of its range.

    Example:
        >>> TemperatureSchedule(4.0, 1.0)(0.5)
        2.0
    """

    start: float
    end: float
    share: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.start, "start")
        check_temperature(self.end, "end")
        if self.end > self.start:
            raise ValueError(
                f"`end` must not be above `start`, got {self.end} and {self.start}: the gate goes "
                "from dense (high) to sparse (low)."
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` must be above 0 and at most 1, got {self.share}.")

    def __call__(self, progress: float) -> float:
        """The temperature after a part of the training.

        Args:
            progress: 0 at the beginning, 1 at the end.
        """
        done = min(max(progress / self.share, 0.0), 1.0)
        return float(self.start ** (1 - done) * self.end**done)
