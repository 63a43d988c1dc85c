"""More calibration text out of little: tokens of it replaced by what the model itself expects.

A fit that has seen little text learns it by heart. Text that the model writes adds to it, but is
written token by token. To draw at every position of a text that is there already costs one pass
over it, which the calibration makes anyway: tokens drawn from the distribution after each position
take the places of a share of the next tokens, and the text so made is read as well. (The same trick
feeds a model its own draws in "Scheduled sampling for transformers", Mihaylova and Martins 2019.)
"""

import torch
from torch import Tensor

REDRAWN = 0.5  # share of the tokens that are replaced
BLOCKS = 256  # about the square root of a vocabulary


def draw_tokens(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token from each row, by inverting the distribution function in two steps.

    `torch.multinomial` draws an exponential number for every probability, which takes a processor
    35 times as long as the softmax before it.

    Args:
        probabilities: (n, V) float32.
        generator: on the CPU.

    Returns:
        (n,) int64.
    """
    rows, vocab_size = probabilities.shape
    width = -(-vocab_size // BLOCKS)
    whole = vocab_size // width * width
    sums = probabilities[:, :whole].unflatten(1, (-1, width)).sum(-1)
    if whole < vocab_size:
        sums = torch.cat([sums, probabilities[:, whole:].sum(-1, keepdim=True)], dim=1)
    ends = sums.cumsum(-1)
    place = torch.rand(rows, 1, generator=generator).to(probabilities.device) * ends[:, -1:]
    # Where it rounded up to the total: the last block, and token, that has any of it.
    most = torch.searchsorted(ends, ends[:, -1:].contiguous())
    block = torch.minimum(torch.searchsorted(ends, place, right=True), most)
    place = place - (ends - sums).gather(1, block)
    tokens = block * width + torch.arange(width, device=block.device)
    within = probabilities.gather(1, tokens.clamp(max=vocab_size - 1))
    within = within.masked_fill(tokens >= vocab_size, 0).cumsum(-1)
    most = torch.searchsorted(within, within[:, -1:].contiguous())
    token = torch.minimum(torch.searchsorted(within, place, right=True), most)
    return (block * width + token).squeeze(1)


def redraw(
    blocks: Tensor, drawn: Tensor, generator: torch.Generator, share: float = REDRAWN
) -> Tensor:
    """Text with some of its tokens replaced.

    Args:
        blocks: token ids (rows, context + 1).
        drawn: (rows, context), tokens drawn after each position of it.
        generator: on the CPU.
        share: of the tokens to replace; the first of a row stays.

    Returns:
        Token ids like `blocks`.
    """
    chosen = torch.rand(drawn.shape, generator=generator) < share
    result = blocks.clone()
    result[:, 1:] = torch.where(chosen, drawn, blocks[:, 1:])
    return result
