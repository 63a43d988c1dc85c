"""The search for a learning rate: some given, and some beyond while the last one is the best."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

FURTHER = 3  # trainings beyond the rates given, at most

Made = TypeVar("Made")


def search(
    run: Callable[[float], Made], rates: Sequence[float], loss: Callable[[Made], float]
) -> dict[float, Made]:
    """Trainings by their rate, least first.

    Args:
        run: trains at a rate.
        rates: in any case; with two of them or more, others follow by the factor between the last
            two, for as long as the best one is the least or the greatest.
        loss: of a training; the least is the best, and what is not finite is none.
    """
    found = {rate: run(rate) for rate in sorted(rates)}
    for _ in range(FURTHER if len(found) > 1 else 0):
        rate = best(found, loss)
        if not at_edge(rate, list(found)):
            break
        ordered = sorted(found)
        neighbour = ordered[1] if rate == ordered[0] else ordered[-2]
        beyond = rate * (rate / neighbour)
        found[beyond] = run(beyond)
    return dict(sorted(found.items()))


def best(found: dict[float, Made], loss: Callable[[Made], float]) -> float:
    """The rate of the least loss.

    Raises:
        ValueError: no loss is finite.
    """
    losses = {rate: loss(made) for rate, made in found.items()}
    finite = {rate: value for rate, value in losses.items() if math.isfinite(value)}
    if not finite:
        rates = ", ".join(f"{rate:g}" for rate in losses)
        raise ValueError(f"No training stayed finite (learning rates {rates}); try smaller ones.")
    return min(finite, key=lambda rate: finite[rate])


def at_edge(rate: float, rates: Sequence[float]) -> bool:
    """Whether the rate is the first or last of those tried, so that a better one may lie beyond."""
    return rate in (min(rates), max(rates))
