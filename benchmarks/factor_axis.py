"""The axis of perplexity factors: log(factor), nats a token, on a logarithmic scale.

So factors of 1.001 and of 100 are both legible. What is nearer to 1 than the floor, or below 1,
stands on the floor.
"""

import math
from typing import Any

TICKS = (1.001, 1.003, 1.01, 1.03, 1.1, 1.3, 2, 5, 20, 100, 1000)
FLOOR = 1.0005


def height(factor: float) -> float:
    """Where a factor stands."""
    return math.log(max(factor, FLOOR))


def factor_axis(panel: Any) -> None:
    """Make the y-axis of a panel one of factors."""
    panel.set_yscale("log")
    panel.set_yticks(
        [height(factor) for factor in (FLOOR, *TICKS)],
        [f"x{FLOOR:g} or less", *(f"x{factor:g}" for factor in TICKS)],
    )
    panel.minorticks_off()
    panel.axhline(height(FLOOR), color="grey", linewidth=0.5)
