"""Heads of several sizes in one: the first bits of every code are the code of a smaller head.

Only the codebooks differ: each size has its own, solved for the bits that it uses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def cut_codes(codes: Tensor, bits: int) -> Tensor:
    """The first `bits` bits of sign codes (V, ceil(R / 8)): (V, ceil(bits / 8)), padding 0."""
    cut = codes[:, : -(-bits // 8)].clone(memory_format=torch.contiguous_format)
    cut[:, -1] &= 255 >> (-bits % 8)
    return cut


def check_stored(num_codebooks: int, stored: Sequence[int], where: str) -> None:
    """Refuse a size that is not there.

    Args:
        num_codebooks: R asked for.
        stored: the sizes that there are, ascending.
        where: who has them, at the end of the message.

    Raises:
        ValueError: names the sizes.
    """
    if num_codebooks in stored:
        return
    *others, last = map(str, stored)
    are = f"are {', '.join(others)} and {last}" if others else f"is {last} alone"
    raise ValueError(
        f"`num_codebooks` {num_codebooks} is not stored: there {are} in {where}. Sizes are chosen "
        "when a model is converted (`convert_to_vq --nested`)."
    )
