"""Checks of the data before anything is computed from them."""

import torch
from torch import Tensor


def check_finite(values: Tensor, name: str) -> None:
    """Refuse NaN and infinity.

    Args:
        values: (..., N, width).
        name: of the values, for the message.

    Raises:
        ValueError: says how many there are and where the first is.
    """
    bad = ~torch.isfinite(values)
    if torch.compiler.is_compiling():  # a compiled graph cannot say which
        torch._assert_async(~bad.any(), f"`{name}` holds values that are NaN or infinite.")
    elif bad.any():
        rows = bad.any(-1).nonzero()[:, -1]
        raise ValueError(
            f"`{name}` holds {int(bad.sum())} values that are NaN or infinite, the first in row "
            f"{int(rows[0])}; remove or replace these rows."
        )


def columns(values: Tensor, width: int, name: str) -> Tensor:
    """Observations as rows, where a vector is one column.

    Args:
        values: (N,) for width 1, or (..., N, width).
        width: what the model expects.
        name: of the values, for the message.

    Returns:
        (..., N, width).

    Raises:
        ValueError: the shape is another one.
    """
    if width == 1 and values.ndim == 1:
        return values[:, None]
    if values.ndim < 2 or values.shape[-1] != width:
        raise ValueError(
            f"`{name}` must have the shape (N, {width}) that the configuration says, got "
            f"{tuple(values.shape)}."
        )
    return values


def check_data(x: Tensor, y: Tensor, components: int) -> None:
    """Refuse data that no mixture can be fitted to.

    Args:
        x: (..., N, d).
        y: (..., N, p).
        components: k.

    Raises:
        ValueError: different lengths, fewer observations than components, or values that are not
            finite.
    """
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"`x` has {tuple(x.shape[:-1])} rows and `y` {tuple(y.shape[:-1])}; every observation "
            "needs both."
        )
    if x.shape[-2] < components:
        raise ValueError(
            f"{x.shape[-2]} observations cannot tell {components} components apart; give at least "
            f"{components}, or fit fewer components."
        )
    check_finite(x, "x")
    check_finite(y, "y")
