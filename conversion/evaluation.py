"""Perplexity of a causal language model on a text of any length."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

CHUNK_ROWS = 1024  # 200 MB of float32 logits at V = 50,257


@dataclass(frozen=True)
class TextScore:
    """How a model predicts a text.

    Attributes:
        nats: negative log-likelihood, summed over the tokens scored.
        tokens: tokens scored; all but the first.
    """

    nats: float
    tokens: int

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the nats a token."""
        return exp(self.nats_per_token)


def exp(nats: float) -> float:
    """Exponential, infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 709 else math.inf


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    context: int,
    stride: int | None = None,
    prefix: Sequence[int] = (),
    batch_size: int = 4,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> TextScore:
    """Score every token but the first, each once, in windows of `context` positions.

    A window begins every `stride` tokens and scores what the windows before it have not, so from
    the second window on each token is predicted from at least `context - stride` tokens (the
    sliding window of Transformers' guide "Perplexity of fixed-length models"). The last window is
    moved back to be as long as the others. A prefix begins every window, and is never scored.

    Args:
        model: any causal language model; its training mode is left as it was.
        input_ids: (tokens,).
        context: positions of a window, at most what the model takes; a prefix takes some of them.
        stride: default `context`, less the length of a prefix: windows side by side.
        prefix: p tokens that the tokenizer puts before every text, from [`text.prefix_ids`].
        batch_size: windows at a time. The model's logits of a batch, batch_size x context x V, are
            all the memory that is used; nothing grows with the text.
        progress: wraps the iteration over batches.

    Returns:
        The score of `tokens - 1` tokens, computed in float32.

    Raises:
        ValueError: fewer than two tokens, or `context`, `stride` or `batch_size` out of range.
    """
    room = context - len(prefix)  # positions for text
    stride = room if stride is None else stride
    if not 1 <= stride <= room or batch_size < 1:
        raise ValueError(
            f"`context` and `batch_size` must be at least 1 and `stride` between 1 and `context` "
            f"(less a prefix of {len(prefix)}), else tokens go unscored; got {context}, "
            f"{batch_size} and {stride}."
        )
    if input_ids.dim() != 1 or len(input_ids) < 2:
        raise ValueError(
            "`input_ids` must be one row of at least two tokens, as the first is not scored; got "
            f"shape {tuple(input_ids.shape)}."
        )
    labels = len(input_ids) - 1
    length = min(room, labels)
    starts = torch.tensor([*range(0, labels - length, stride), labels - length])
    ends = starts + length
    new = ends.diff(prepend=torch.tensor([0]))  # labels of each window not scored before
    offsets = torch.arange(length + 1)
    first = input_ids.new_tensor(prefix)
    nats = 0.0
    was_training = model.training
    model.eval()
    try:
        for batch in progress(torch.arange(len(starts)).split(batch_size)):
            windows = input_ids[starts[batch, None] + offsets]  # (B, length + 1)
            windows = torch.cat([first.expand(len(batch), -1), windows], 1).to(model.device)
            logits = model(windows[:, :-1], use_cache=False).logits  # (B, p + length, V)
            for rows, ids, count in zip(logits, windows, new[batch].tolist(), strict=True):
                nats += _nats(rows[-count:], ids[-count:])
    finally:
        model.train(was_training)
    return TextScore(nats, labels)


def _nats(logits: Tensor, labels: Tensor) -> float:
    nats = 0.0
    for some, their in zip(logits.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
        nats += float(torch.nn.functional.cross_entropy(some.float(), their, reduction="sum"))
    return nats
