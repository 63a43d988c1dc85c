"""Hidden states of a frozen backbone, in batches that are never kept."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

BATCH_TOKENS = 4096


@torch.no_grad()
def hidden_states(
    backbone: PreTrainedModel,
    blocks: Tensor,
    *,
    skip: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and the tokens that follow them, a few thousand positions at a time.

    Args:
        backbone: returns `last_hidden_state` (rows, context, d).
        blocks: token ids (rows, context + 1); each row is a context of its own.
        skip: first positions of each row to leave out; the others still see them.
        progress: wraps the iteration over batches, tqdm for example.

    Yields:
        hidden (n, d) float32 and labels (n,), n = positions of the batch, on the backbone's
        device.
    """
    device = backbone.device
    rows = max(1, BATCH_TOKENS // max(1, blocks.shape[1] - 1))
    for start in progress(range(0, len(blocks), rows)):
        batch = blocks[start : start + rows].to(device)
        hidden = backbone(batch[:, :-1], use_cache=False).last_hidden_state
        yield hidden[:, skip:].float().flatten(0, 1), batch[:, 1 + skip :].flatten()
