"""Hidden states of a frozen backbone, in batches; kept only where they are wanted again."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_vqlogits.ops.precision import product_dtype

BATCH_TOKENS = 4096
KEPT_BYTES = 2 << 30  # of hidden states, at most: 900,000 positions of d 576 in float32


@torch.no_grad()
def hidden_states(
    backbone: PreTrainedModel,
    blocks: Tensor,
    *,
    skip: int = 0,
    fast: bool = False,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and the tokens that follow them, a few thousand positions at a time.

    Args:
        backbone: returns `last_hidden_state` (rows, context, d).
        blocks: token ids (rows, context + 1); each row is a context of its own.
        skip: first positions of each row to leave out; the others still see them.
        fast: take the products of a float32 backbone in the type that the device multiplies
            fastest, where statistics and training want many hidden states rather than all digits.
        progress: wraps the iteration over batches, tqdm for example.

    Yields:
        hidden (n, d) float32 and labels (n,), n = positions of the batch, on the backbone's
        device.
    """
    device = backbone.device
    dtype = product_dtype(device)
    mixed = fast and backbone.dtype == torch.float32 and dtype != torch.float32
    rows = max(1, BATCH_TOKENS // max(1, blocks.shape[1] - 1))
    for start in progress(range(0, len(blocks), rows)):
        batch = blocks[start : start + rows].to(device)
        with torch.autocast(device.type, dtype, enabled=mixed):
            hidden = backbone(batch[:, :-1], use_cache=False).last_hidden_state
        yield hidden[:, skip:].float().flatten(0, 1), batch[:, 1 + skip :].flatten()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block no parameter of the module takes a gradient; after it those do that did."""
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


class KeptStates:
    """Fast hidden states of blocks, computed once where all of them fit into `KEPT_BYTES`.

    Args:
        backbone: returns `last_hidden_state` (rows, context, d).
        blocks: token ids (rows, context + 1); each row is a context of its own. Rows may change
            until they are read for the first time.
        versions: so many versions of one text follow each other in `blocks`.
        keep: false to keep nothing.
    """

    def __init__(
        self, backbone: PreTrainedModel, blocks: Tensor, *, versions: int = 1, keep: bool = True
    ):
        self.blocks, self.versions = blocks, versions
        self._room = KEPT_BYTES if keep else 0
        self._backbone = backbone
        self._kept: Tensor | None = None
        self._known = torch.zeros(len(blocks), dtype=torch.bool)
        self._context = blocks.shape[1] - 1

    def __call__(
        self, rows: Tensor, *, progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter
    ) -> Iterator[Tensor]:
        """Hidden states (n, d) float32 of some rows, a few thousand positions at a time.

        Args:
            rows: which, (m,).
            progress: wraps the iteration over batches.
        """
        for part in progress(rows.split(max(1, BATCH_TOKENS // max(1, self._context)))):
            known = bool(self._known[part].all())
            if self._kept is not None and known:
                hidden = self._kept[part].to(self._backbone.device).flatten(0, 1)
            else:
                ((hidden, _),) = hidden_states(self._backbone, self.blocks[part], fast=True)
                self._keep(part, hidden)
            yield hidden

    def _keep(self, rows: Tensor, hidden: Tensor) -> None:
        size = hidden.shape[-1]
        if self._kept is None:
            if 4 * len(self.blocks) * self._context * size > self._room:
                return
            self._kept = torch.empty(len(self.blocks), self._context, size)
        self._kept[rows] = hidden.view(len(rows), self._context, size).cpu()
        self._known[rows] = True
