"""End-to-end distillation: KL of the converted model to the original, through the frozen body.

    tokens -> quantised input embedding -> body -> quantised head      the student, trained
    tokens -> dense input embedding     -> body -> dense layer         the teacher

The distillation of the head reads hidden states of the dense input embedding only. Here codewords
and biases of both sides learn what the input side does to these states, and to make up for it; in
a tied model the shared codewords take both gradients. Codes stay.

A step costs a pass through the body forwards and one backwards, which stops at the input embedding
because nothing of the body is trained. The loss is taken in chunks of rows, whose gradients in the
hidden states are gathered first: there are never N x V logits, and one backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.embedding import VQEmbedding
from hf_vqlogits.ops.precision import product_dtype

from .code_learning import CHUNK_BYTES, Logits
from .distillation_state import END_TO_END, fingerprint
from .held_out import rows_of_step, split
from .streaming import KeptStates, frozen
from .training import Advance, Distillation, Notify, Training, divergence


def distill_end_to_end(
    backbone: PreTrainedModel,
    embedding: VQEmbedding,
    head: VQLogitsHead,
    states: KeptStates,
    *,
    teacher: Logits,
    steps: int,
    seed: int = 0,
    learning_rate: float | None = None,
    state_file: Path | None = None,
    notify: Notify = lambda made, kl: None,
    advance: Advance = lambda made: None,
) -> Distillation:
    """Train codewords and biases of input embedding and head towards the original model.

    Args:
        backbone: of the original, with its dense input embedding; nothing of it is changed.
        embedding: the quantised input embedding, trained in place; what it shares with the head
            stays shared.
        head: trained in place.
        states: the original's hidden states of the calibration text.
        teacher: the original logits (n, V) of hidden states (n, d).
        steps: of about a thousand positions each.
        seed: of the order of the text and of what is kept out.
        learning_rate: of Adam, in units of each tensor's root mean square; falls to zero along half
            a cosine. Default: by the divergence of the start and the number of codebooks.
        state_file: where the run is kept after every check, and found after an interrupt; whoever
            has no further use for it removes it.
        notify: called with the steps made and the KL on the positions kept out, when it was judged.
        advance: called with the steps made, more often.

    Returns:
        The KL divergence before and after, and how it went.

    Raises:
        ConversionError: the text is too short to hold some of it out, or `state_file` is of
            another run.
    """
    student = _Student(backbone, embedding)
    sides = nn.ModuleList([embedding, head])
    held, order = split(states.blocks, steps, seed, "input_distill_steps", versions=states.versions)
    rows = rows_of_step(states.blocks)

    def of_rows(some: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (n, d) of the student and of the original."""
        return student(states.blocks[some, :-1]), torch.cat([*states(some)])

    @torch.no_grad()
    def measure() -> float:
        total, positions = 0.0, 0
        for some in held.split(rows):
            hidden, wanted = of_rows(some)
            size = _chunk(head)
            for h, w in zip(hidden.split(size), wanted.split(size), strict=True):
                total += float(divergence(teacher(w), head(h)))
            positions += len(hidden)
        return total / positions

    def backward(step: int) -> None:
        hidden, wanted = of_rows(order[step * rows : (step + 1) * rows])
        hidden.backward(gradient_of_divergence(head, teacher, hidden, wanted))
        advance(step + 1)

    training = Training(sides, measure, notify)
    tensors = [*sides.state_dict().values(), states.blocks]
    key = fingerprint(tensors, (steps, seed, learning_rate))
    with frozen(backbone):
        training.begin(state_file, END_TO_END, key)
        if learning_rate is None:
            learning_rate = training.rate(max(head.num_codebooks, embedding.num_codebooks))
        training.descend(sides.parameters(), learning_rate, range(steps), backward)
    return training.finish()


def gradient_of_divergence(
    head: VQLogitsHead, teacher: Logits, hidden: Tensor, wanted: Tensor
) -> Tensor:
    """Gradient of the mean KL divergence in the student's hidden states; that in the head is added.

    Args:
        head: whose parameters' gradients are added to.
        teacher: the original logits (n, V) of hidden states (n, d).
        hidden: hidden states (N, d) of the student; their graph is left alone.
        wanted: hidden states (N, d) of the original.

    Returns:
        (N, d).
    """
    rows, size = hidden.detach().requires_grad_(), _chunk(head)
    for h, w in zip(rows.split(size), wanted.split(size), strict=True):
        (divergence(teacher(w), head(h)) / len(rows)).backward()
    assert rows.grad is not None
    return rows.grad


class _Student:
    """Hidden states of a backbone that reads tokens by another embedding than its own."""

    def __init__(self, backbone: PreTrainedModel, embedding: VQEmbedding):
        self._backbone, self._embedding = backbone, embedding
        self._dtype = product_dtype(backbone.device)

    def __call__(self, ids: Tensor) -> Tensor:
        """Hidden states (n, d) float32 of token ids (rows, context)."""
        device = self._backbone.device
        fast = nullcontext() if self._dtype is torch.float32 else self._autocast(device)
        with self._reading(), fast:
            hidden = self._backbone(ids.to(device), use_cache=False).last_hidden_state
        return hidden.float().flatten(0, 1)

    def _autocast(self, device: torch.device) -> Any:
        return torch.autocast(device.type, dtype=self._dtype)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self._embedding(*inputs).to(output.dtype)

        hook = self._backbone.get_input_embeddings().register_forward_hook(replace)
        try:
            yield
        finally:
            hook.remove()


def _chunk(head: VQLogitsHead) -> int:
    """Rows whose logits are held at a time."""
    return max(1, CHUNK_BYTES // (4 * head.out_features))
