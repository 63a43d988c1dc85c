"""Calibration text of a training: what is kept out to judge by, and what each step reads."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from .corpus import Corpus
from .errors import ConversionError

POSITIONS = 1024  # of a step
HELD_OUT = 8  # steps' worth of positions on which progress is judged


def split(
    blocks: Tensor, steps: int, seed: int, option: str = "distill_steps", *, versions: int = 1
) -> tuple[Tensor, Tensor]:
    """Rows kept out, and those of all steps: in another order every time all have been seen.

    Args:
        blocks: token ids (rows, context + 1).
        steps: of [`rows_of_step`] rows each.
        seed: of the order and of what is kept out.
        option: which asked for the training.
        versions: so many versions of one text follow each other in `blocks`. What is kept out is of
            the first, and no version of it is trained on.

    Returns:
        Rows kept out (m,), and rows to train on (steps * rows of a step,).

    Raises:
        ConversionError: the text is too short.
    """
    text = blocks[: len(blocks) // versions]
    check_length(text, option)
    generator = torch.Generator().manual_seed(seed)
    held, rest = _divided(text, generator)
    train = torch.cat([rest + version * len(text) for version in range(versions)])
    rows = rows_of_step(text)
    epochs = math.ceil(steps * rows / len(train))
    order = [train[torch.randperm(len(train), generator=generator)] for _ in range(epochs)]
    return held, torch.cat([train[:0], *order])[: steps * rows]


def rows_to_fit(blocks: Tensor, seed: int) -> Tensor:
    """Rows (m,) of a text, in its order, that [`split`] by the same seed does not keep out.

    Args:
        blocks: token ids (rows, context + 1); of a text that is too short to be split all rows.
        seed: of what is kept out.
    """
    if not long_enough(blocks):
        return torch.arange(len(blocks))
    return _divided(blocks, torch.Generator().manual_seed(seed))[1].sort().values


def keep_out(corpus: Corpus, seed: int) -> Corpus:
    """The corpus with some rows of its calibration text kept out of every fit, if it is long."""
    blocks = corpus.calibration
    if not long_enough(blocks):
        return corpus
    held, rest = _divided(blocks, torch.Generator().manual_seed(seed))
    return replace(corpus, calibration=blocks[rest.sort().values], kept_out=blocks[held])


def long_enough(blocks: Tensor) -> bool:
    """Whether rows of token ids (rows, context + 1) can be split into text to train on and not."""
    return len(blocks) >= _least_rows(blocks)


def check_length(blocks: Tensor, option: str = "distill_steps") -> None:
    """Refuse text that is not [`long_enough`].

    Args:
        blocks: token ids (rows, context + 1).
        option: which asked for the training.

    Raises:
        ConversionError: says how many tokens are needed.
    """
    if not long_enough(blocks):
        raise ConversionError(
            f"Distillation needs at least {_least_rows(blocks) * blocks.shape[1]:,} tokens of "
            f"calibration text, there are {blocks.numel():,}; give more text or `{option}` 0."
        )


def rows_of_step(blocks: Tensor) -> int:
    """How many rows of token ids (rows, context + 1) make a step of `POSITIONS`."""
    return max(1, POSITIONS // (blocks.shape[1] - 1))


def _least_rows(blocks: Tensor) -> int:
    """So many that a fifth, rounded down, is a row or more, and the others are a step's or more."""
    rows = rows_of_step(blocks)
    return max(5, rows + (rows - 1) // 4)


def _divided(blocks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows kept out, and the others, both in a random order."""
    held = min(HELD_OUT * rows_of_step(blocks), len(blocks) // 5)
    shuffled = torch.randperm(len(blocks), generator=generator)
    return shuffled[:held], shuffled[held:]
